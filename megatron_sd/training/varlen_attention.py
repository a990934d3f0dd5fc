"""Attention over sequences that follow one another in a row, and may begin with the same tokens, registered
with transformers as `varlen`.

On CUDA it is torch's own flash attention, which takes float16 and bfloat16 alone. It has not run:
tests/algorithm/test_packed.py puts an eager stand-in in its place. Elsewhere it is torch's scaled dot product,
part by part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from megatron_sd.errors import ConfigError
from megatron_sd.records import Layout
from megatron_sd.training.microbatch import Runs

ATTENTION = "varlen"
CAUSAL = (-1, 0)  # a window: everything to the left, nothing to the right, counted from the last key
# what some models ask of their attention
NOT_SUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
_MASK_STEP = 512  # masks are made in multiples of it, so that few are made


# whose packed rows are their padded ones (tests/algorithm/test_packed_families.py). In others something reads
# across the sequences of a row, which are told apart in attention alone: layers that are recurrent or
# convolutional, masks of their own.
PACKED_FAMILIES = (
    *("cohere", "cohere2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite"),
    *("llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
)


def check_layout(config: PretrainedConfig, layout: Layout) -> None:
    """Raise ConfigError for a model whose sequences cannot be read so."""
    if layout == "padded":
        return
    if config.model_type not in PACKED_FAMILIES:
        raise ConfigError(
            f"update.pack_sequences: found true for a model of the family {config.model_type}, whose layers may read"
            f" across the sequences of a row, expected false (and model.attention sdpa), or one of"
            f" {', '.join(PACKED_FAMILIES)}"
        )
    asked = [
        name
        for name in ("sliding_window", "attn_logit_softcapping")
        if getattr(config, name, None) is not None
    ]
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if layout == "shared" and asked and slides:
        raise ConfigError(
            f"model.attention: found varlen for a model with {' and '.join(asked)} ({config.model_type}), expected"
            " plain causal attention: set model.attention sdpa, whose rows are packed, too"
        )


def packed_attention(
    module, query, key, value, attention_mask, *, runs: Runs | None = None, **options
) -> tuple[Tensor, None]:
    """Each part of the row sees itself, causally, and what it goes on from. query, key, value: [1, heads,
    tokens, size], key-value heads fewer; returns [1, tokens, heads, size]. Raises ConfigError for a batch that
    is no packed row, or what a model asks beside."""
    asked = [name for name in NOT_SUPPORTED if options.get(name) is not None]
    if asked or runs is None or query.shape[0] != 1:
        raise ConfigError(
            f"model.attention: found varlen for {query.shape[0]} rows"
            f" {'with' if runs is not None else 'without'} sequence starts, the model asks for {asked},"
            " expected one packed row of plain causal attention: set update.pack_sequences, or"
            " model.attention sdpa"
        )
    read = _flash if query.is_cuda else _part_by_part
    return read(query, key, value, runs, options.get("scaling")), None


def _flash(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """In one call: keys and values of an opening are laid out anew in front of each part that follows it."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    if runs.keys is not None:
        key, value = key.index_select(0, runs.keys), value.index_select(0, runs.keys)
    output = varlen_attn(
        query,
        key,
        value,
        runs.starts,
        runs.key_starts,
        runs.longest,
        runs.most_seen,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.unsqueeze(0)


def _part_by_part(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    lengths = [part.length for part in runs.parts]
    queries, keys, values = (whole.split(lengths, 2) for whole in (query, key, value))
    options = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    outputs = []
    for number, (length, after) in enumerate(runs.parts):
        before, seen = (0, [number]) if after is None else (lengths[after], [after, number])
        own = _joined(keys, seen), _joined(values, seen)
        if before < length:
            # A mask is read and multiplied out where it hides, too. Asking for the opening's rows as well,
            # and forgetting them, makes the whole a causal square, of which half is left out.
            square = scaled_dot_product_attention(_joined(queries, seen), *own, is_causal=True, **options)
            outputs.append(square[:, :, before:])
        else:
            mask = _causal_mask(-(-runs.most_seen // _MASK_STEP) * _MASK_STEP, query.dtype)
            mask = mask[before : before + length, : before + length]
            outputs.append(scaled_dot_product_attention(queries[number], *own, attn_mask=mask, **options))
    return torch.cat(outputs, 2).transpose(1, 2)


def _joined(parts: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """Some of the parts, one after the other; one alone is not copied."""
    return parts[numbers[0]] if len(numbers) == 1 else torch.cat([parts[number] for number in numbers], 2)


@functools.lru_cache(maxsize=2)
def _causal_mask(size: int, dtype: torch.dtype) -> Tensor:
    """[size, size]: 0 where a token sees another, else -inf."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu(1)


def no_mask(*_: object, **__: object) -> None:
    """Parts say all that a mask would."""


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
