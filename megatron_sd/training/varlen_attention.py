"""torch's own flash attention over sequences that follow one another in a row, registered with transformers
as `varlen`.

torch has it for CUDA alone, in float16 and bfloat16. It has not run: tests/algorithm/test_packed.py puts an
eager stand-in in its place.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from megatron_sd.errors import ConfigError

ATTENTION = "varlen"
CAUSAL = (-1, 0)  # a window: everything to the left, nothing to the right
# what some models ask of their attention
NOT_SUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


def packed_attention(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """Causal within each sequence. query, key, value: [1, heads, tokens, size], key-value heads fewer;
    returns [1, tokens, heads, size]. Raises ConfigError for a batch that is no packed row, or what a model
    asks beside."""
    asked = [name for name in NOT_SUPPORTED if options.get(name) is not None]
    starts, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if asked or starts is None or query.shape[0] != 1:
        raise ConfigError(
            f"model.attention: found varlen for {query.shape[0]} rows"
            f" {'with' if starts is not None else 'without'} sequence starts, the model asks for {asked},"
            " expected one packed row of plain causal attention: set update.pack_sequences, or"
            " model.attention sdpa"
        )
    parts = (part[0].transpose(0, 1) for part in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    output = varlen_attn(
        *parts,
        starts,
        starts,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=CAUSAL,
        enable_gqa=grouped,
    )
    return output.unsqueeze(0), None


def no_mask(*_: object, **__: object) -> None:
    """Starts say all that a mask would."""


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
