"""What an evaluation is of: versions of models and questions, and the file that keeps two evaluations
apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.durable.files import write_whole
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.own_code.loading import digests
from megatron_sd.records import Question
from megatron_sd.retrieval.corpus.manifest import files_version

_LIMITS = (
    "max_search_turns",
    "max_turn_tokens",
    "max_observation_tokens",
    "max_rollout_tokens",
    "max_query_bytes",
    "attempts",
)
IDENTITY_NAME = "evaluation.json"


def questions_version(questions: Sequence[Question]) -> str:
    """A hash of ids, texts and gold answers, in any order."""
    lines = sorted(json.dumps([q.id, q.text, q.golden_answers], ensure_ascii=False) for q in questions)
    return xxhash.xxh3_128("\n".join(lines).encode()).hexdigest()


def model_version(path: str) -> str:
    """A hash of the configuration, tokenizer and weights of a model directory."""
    return files_version(Path(path), (".json", ".safetensors", ".bin", ".model", ".txt"))


# Sections of the configuration that an identity holds whole: a key that is newer than an evaluation counts as its
# default there.
_SECTIONS: dict[str, dict[str, Any]] = {
    "reward": json.loads(json.dumps(dataclasses.asdict(RewardConfig()))),
    "protocol": json.loads(json.dumps(dataclasses.asdict(ProtocolConfig()))),
    "limits": {"attempts": RolloutConfig().attempts},
}


def rollouts_identity(
    model: ModelConfig,
    retriever: RetrieverConfig,
    protocol: ProtocolConfig,
    rollout: RolloutConfig,
    *,
    corpus_version: str,
) -> dict[str, Any]:
    """What rollouts depend on, beside questions and sampling: model, passages, protocol, limits."""
    return {
        "model": model.path,
        "model_version": model_version(model.path),
        "dtype": model.dtype,
        "corpus_version": corpus_version,
        "top_k": retriever.top_k,
        "search": {
            name: value for name, value in dataclasses.asdict(retriever.search).items() if name != "device"
        },
        "protocol": dataclasses.asdict(protocol),
        "limits": {name: getattr(rollout, name) for name in _LIMITS},
    }


def own_code(config: Any) -> dict[str, Any]:
    """Digests of the files of the user's own functions, for an identity; nothing where there are none."""
    found = digests(config)
    return {"own_code": found} if found else {}


def check_causal(path: str) -> None:
    """Raise DataError for a directory whose config.json names another kind of model (an encoder would load,
    and babble)."""
    config = Path(path) / "config.json"
    if not config.is_file():
        raise DataError(
            f"model.path: found no config.json in {path}, expected a directory with a causal language model"
        )
    try:
        architectures = dict(json.loads(config.read_text(encoding="utf-8"))).get("architectures") or []
    except (ValueError, TypeError) as error:
        raise DataError(f"{config} is no JSON object ({error}); expected a model's configuration") from error
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise DataError(
            f"model.path: {path} holds a {architectures[0]}, which is no causal language model; expected one"
            " that generates text, such as Qwen2ForCausalLM"
        )


def claim(
    output: Path, identity: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Make `output` the directory of this evaluation. Raises ConfigError when it is that of another one.

    sections: defaults of further sections of the identity, for keys that are newer than the evaluation.
    """
    path = output / IDENTITY_NAME
    wanted = json.loads(json.dumps(identity))
    if path.exists():
        found = read_identity(output)
        for name, defaults in (_SECTIONS | dict(sections or {})).items():
            if isinstance(found.get(name), dict):
                found[name] = dict(defaults) | found[name]
        for key in wanted.keys() | found.keys():
            if found.get(key) != wanted.get(key):
                raise ConfigError(
                    f"--output: {output} holds an evaluation whose {key} is {found.get(key)!r}, now it is"
                    f" {wanted.get(key)!r}: finish it as it was begun, or choose another directory"
                )
        return
    write_whole(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")


def read_identity(output: Path) -> dict[str, Any]:
    """What the evaluation in a directory is of. Raises DataError when there is none, or its file is
    broken."""
    path = output / IDENTITY_NAME
    if not path.is_file():
        raise DataError(
            f"{output} is no evaluation: found no {IDENTITY_NAME}, expected a directory that `sd-search eval`"
            " wrote"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is no JSON object ({error}); evaluate into another directory") from error
