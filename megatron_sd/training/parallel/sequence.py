"""Sequence parallelism (DeepSpeed-Ulysses): the ranks of a group read the same microbatch, each a slice of
every sequence.

Everything but attention works token by token, so a rank needs its slice only. In attention DeepSpeed's
all-to-all gives each rank all positions of some of the heads, and takes them back afterwards. The backbone
is called with whole sequences, as without slices, and returns the last hidden states of all positions, so
that rows are found where they always are; each rank of the group then puts its share of the rows
(microbatches.row_share) through the head.

Attention masks and the teacher's continuation of a cached prompt keep working: a rank caches its slice of
the prompt's keys, and the mask is laid out in the order in which the all-to-all brings keys together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F  # noqa: N812
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from megatron_sd.config import UpdateConfig
from megatron_sd.config.checks import check_sequence_heads
from megatron_sd.distributed.groups import RankGroup, joined_slices
from megatron_sd.errors import ConfigError

KEY = "update.sequence_parallel_size"
# what some models ask of their attention
NOT_SUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


def split_sequences(model: PreTrainedModel, update: UpdateConfig, group: RankGroup) -> PreTrainedModel:
    """The model, whose backbone computes this rank's slice of the sequences it is given; untouched where a
    rank is alone.

    Collective. Raises ConfigError when its heads cannot be dealt to the group.
    """
    if group.size == 1:
        return model
    heads = model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", heads)
    check_sequence_heads(update, num_heads=heads, num_kv_heads=kv_heads)
    deepspeed.init_distributed(auto_mpi_discovery=False)
    name = f"sequence_parallel_{group.size}"
    attention = DistributedAttention(_whole_attention, group.processes, scatter_idx=2, gather_idx=1)
    AttentionInterface.register(name, functools.partial(_split_attention, attention, group.size))
    model.set_attn_implementation(name)
    model.base_model.forward = functools.partial(_read_own_slice, model.base_model.forward, group)
    return model


def _read_own_slice(
    read: Callable[..., Any],
    group: RankGroup,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool,
) -> Any:
    """What `read`, the backbone's forward, does, for this rank's slice of input_ids [B, S] and position_ids
    [B, S]; the last hidden states returned are those of all slices. attention_mask: [B, positions in the
    cache + S], with a cache only."""
    width = input_ids.shape[1]
    if position_ids is None:
        position_ids = torch.arange(width, device=input_ids.device)[None]
    output = read(
        input_ids=_own_slice(input_ids, group),
        attention_mask=None
        if attention_mask is None
        else mask_in_group_order(attention_mask.bool(), width, group.size),
        position_ids=_own_slice(position_ids, group),
        past_key_values=past_key_values,
        use_cache=use_cache,
    )
    output.last_hidden_state = joined_slices(output.last_hidden_state, group)[:, :width]
    return output


def _own_slice(whole: Tensor, group: RankGroup) -> Tensor:
    """[B, S] -> [B, ceil(S / ranks)], padded with 0 at the end."""
    return _padded(whole, group.size).chunk(group.size, 1)[group.rank]


def _padded(whole: Tensor, size: int) -> Tensor:
    """[B, S] -> [B, the next multiple of size], with 0 (False)."""
    return F.pad(whole, (0, -whole.shape[1] % size))


def mask_in_group_order(is_token: Tensor, num_new: int, size: int) -> Tensor:
    """[B, 1, queries, keys] bool, True where a query sees a key. is_token: [B, cached + num_new] bool,
    False at padding.

    Queries are the new positions, padded to a multiple of size. Keys come as the ranks hold them: the first
    rank's slice of the cache and its slice of the new positions, then the second's, and so on.
    """
    # Keys arrive by rank, not by position: each rank's slice of the cache, then its slice of what is new.
    # Padding of a slice is hidden like the padding of a prompt.
    cached, new = (_padded(part, size) for part in is_token.split((is_token.shape[1] - num_new, num_new), 1))
    causal = torch.ones(new.shape[1], new.shape[1], dtype=torch.bool, device=new.device).tril()
    seen_new = causal & new[:, None, None]
    seen_cached = cached[:, None, None].expand(-1, -1, new.shape[1], -1)
    pairs = zip(seen_cached.chunk(size, -1), seen_new.chunk(size, -1), strict=True)
    return torch.cat([part for pair in pairs for part in pair], -1)


def _split_attention(  # noqa: PLR0913, PLR0917 (transformers calls it by position)
    attention: DistributedAttention,
    size: int,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, slice, d], key and value [B, key-value heads, slice, d] of this rank -> [B, slice,
    heads, d]."""
    if unknown := [name for name in NOT_SUPPORTED if asked.get(name) is not None]:
        raise ConfigError(
            f"{KEY}: found {size} for a model whose attention has {', '.join(unknown)}, expected plain causal"
        )
    copies = max(size // key.shape[1], 1)  # fewer key-value heads than ranks: several ranks get the same one
    parts = (query, repeat_kv(key, copies), repeat_kv(value, copies))
    return attention(*(part.transpose(1, 2) for part in parts), 0, None, attention_mask, scaling), None


def _whole_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """transformers' sdpa over all positions of this rank's heads, [B, positions, heads, d]; causal without
    a mask."""
    layer = SimpleNamespace(num_key_value_groups=query.shape[2] // key.shape[2], is_causal=True)
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return sdpa_attention_forward(layer, *parts, mask, scaling=scaling)[0]
