"""Models of local directories with every weight from its files: a tensor that is missing is an error, never
a random one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from megatron_sd.errors import ConfigError, DataError, MegatronSdError
from megatron_sd.pretrained.directory import read_config, stored_tensors
from megatron_sd.pretrained.on_demand import load_on_demand

# Tensors that transformers may create or leave out without harm: nothing that is computed here depends on
# them.
MAY_BE_MISSING = (r"(^|\.)pooler\.",)  # BERT's; no pooling of ours reads it
MAY_BE_LEFT_OUT = (
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|position_ids)$",  # buffers of older versions
    r"(^|\.)(v_head|score)\.",  # a critic or a reward head trained on top
)
HEADS = (  # of an encoder trained with one, left out when its hidden states are read
    r"^(cls|lm_head|classifier|qa_outputs|predictions|pooler|vocab_[a-z_]+|generator_[a-z_]+|dense|linear)\b",
    r"^decoder\.",  # of an encoder-decoder whose encoder is read
)
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_NAMED = 3  # tensors in one message


def load_config(path: str, key: str = "model.path") -> PretrainedConfig:
    """The configuration of a causal language model. Raises DataError for a directory that holds none."""
    raw = read_config(Path(path), key)
    kind = ", ".join(raw.get("architectures") or [str(raw.get("model_type", "an unknown kind"))])
    expected = "expected a text-only causal language model (Qwen2, Qwen3, Llama, Mistral, ...)"
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        code = "auto_map" in raw
        reason = (
            "which needs code of its own directory, and none is run"
            if code
            else "which transformers does not know"
        )
        raise DataError(f"{key} {path} holds a {kind} ({reason}), {expected}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise DataError(f"{key} {path} holds a {kind}, {expected}")
    return config


def check_head(config: PretrainedConfig, path: str) -> None:
    """For who applies the head by itself. Raises DataError for a model that changes logits after its head:
    they would be others than those it samples from."""
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise DataError(
                f"model.path {path} has {name}={value} in its config.json, expected a plain linear head"
            )


def load_causal_lm(
    path: str,
    *,
    dtype: Any,
    attention: str = "sdpa",
    config: PretrainedConfig | None = None,
    key: str = "model.path",
    on_demand: bool = False,
) -> PreTrainedModel:
    """A causal language model, in the dtype asked for, on the CPU, in evaluation mode.

    on_demand: where the files allow it the weights are not read yet; the parameters know where they are
    (pretrained/on_demand.py), and the caller sees to them.

    Raises DataError that names the tensors when the files do not hold exactly the model's, ConfigError for
    an attention that the family or the machine lacks.
    """
    config = load_config(path, key) if config is None else config
    try:
        if (
            on_demand
            and (model := load_on_demand(path, dtype=dtype, attention=attention, config=config, key=key))
            is not None
        ):
            return model
        options = {"config": config, "dtype": dtype, "attn_implementation": attention}
        return load_whole(AutoModelForCausalLM, path, options, key=key)
    except ImportError as error:
        raise ConfigError(
            f"model.attention: found {attention!r}, which this machine lacks ({_first_line(error)}); expected"
            " sdpa"
        ) from error
    except ValueError as error:
        if "attention" not in str(error):
            raise
        raise _attention_error(config, attention) from error


def _attention_error(config: PretrainedConfig, attention: str) -> MegatronSdError:
    """What to do about an attention that a family does not have."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not family._supports_attention_backend:
        return DataError(
            f"model.path holds a {family.__name__}, whose attention is of its own kind: families like it"
            " (Bloom, Mamba, ...) are not supported, expected one with transformers' attention interface"
            " (Qwen2, Qwen3, Llama, Mistral, ...)"
        )
    others = ["sdpa"] if family._supports_sdpa else ["eager"]
    return ConfigError(
        f"model.attention: found {attention!r}, which {family.__name__} lacks in transformers, expected"
        f" {' or '.join(others)}"
    )


def load_whole(
    kind: Any, path: str | Path, options: Mapping[str, Any], *, key: str, unused: Sequence[str] = ()
) -> PreTrainedModel:
    """`kind.from_pretrained(path, **options)` with every tensor of the model from the files, and every
    tensor of the files in the model, but for those of MAY_BE_MISSING, MAY_BE_LEFT_OUT and the patterns
    `unused`. Raises DataError for any other."""
    stored_tensors(Path(path), key)  # raises for files that are not whole
    with _quiet():
        try:
            model, report = kind.from_pretrained(
                path, **_LOCAL, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except OSError as error:
            raise DataError(
                f"{key} {path}: {_first_line(error)}; expected config.json and safetensors"
            ) from error
    mismatched = sorted(report["mismatched_keys"], key=str)
    if mismatched:
        name, found, wanted = mismatched[0]
        raise DataError(
            f"{key} {path}: {name} is {tuple(found)} in the weights and {tuple(wanted)} by config.json"
            f" ({len(mismatched)} tensors in all): weights and config.json are of two models, or one was"
            " edited"
        )
    missing = _but(report["missing_keys"], MAY_BE_MISSING)
    left_out = _but(report["unexpected_keys"], (*MAY_BE_LEFT_OUT, *unused))
    if missing or left_out:
        raise DataError(f"{key} {path}: {_difference(missing, left_out)}")
    return model


def _but(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns))


def _difference(missing: list[str], left_out: list[str]) -> str:
    """What is missing or too much, and the likely cause."""
    lacks = f"its weights lack {_listed(missing)}, which would be random numbers" if missing else ""
    has = (
        f"its weights hold {_listed(left_out)}, which the model of config.json does not have"
        if left_out
        else ""
    )
    return "; ".join(part for part in (lacks, has, _cause(missing, left_out)) if part)


def _cause(missing: list[str], left_out: list[str]) -> str:
    prefix = _prefix(missing, left_out)
    if prefix.startswith("base_model."):
        return (
            f"every name begins with {prefix!r}, as peft saves it: merge the adapter (merge_and_unload) and"
            " save again"
        )
    if prefix:
        return (
            f"every name begins with {prefix!r}, as a wrapper (DDP, DeepSpeed, Lightning) saves it: save the"
            " inner model"
        )
    if missing == ["lm_head.weight"]:
        return (
            "set tie_word_embeddings to true in config.json if the head is the embedding, else save the model"
            " again"
        )
    if missing and left_out:
        return "config.json and weights are of two models"
    if missing:
        return "the model was saved in part: copy or save it again"
    return (
        "config.json describes a smaller model (num_hidden_layers?): copy the config.json that belongs to the"
        " weights"
    )


def _prefix(missing: list[str], left_out: list[str]) -> str:
    """What stands before every name of the file's, where that is all the difference; else nothing."""
    for name in left_out[:1]:
        for wanted in missing:
            prefix = name.removesuffix(wanted)
            if prefix != name and prefix and all(other.startswith(prefix) for other in left_out):
                return prefix
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights and its progress bar: what matters is said once,
    by us."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
