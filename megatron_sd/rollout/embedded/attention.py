"""Attention of the embedded engine, registered with transformers: decoding neither repeats grouped heads
nor shared prompts."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from megatron_sd.rollout.embedded.kv_cache import RowCache, StateProbe

ATTENTION = "sd_search_rows"


def row_attention(
    module, query, key, value, attention_mask, *, row_cache: RowCache | StateProbe | None = None, **options
):
    """Scaled-dot-product attention over a RowCache; without one, and in prefill, it is transformers' own
    sdpa.

    A model that does not hand `row_cache` on fails on its first shared prompt, because the mask is then
    wider than the keys.

    With one query position, the query heads that share a key-value head are that head's query positions:
    [m, heads, 1, d] is viewed as [m, key-value heads, heads / key-value heads, d].
    """
    if isinstance(row_cache, StateProbe):
        row_cache.attended[module.layer_idx] = key.shape, value.shape
        row_cache = None
    if row_cache is None or query.shape[2] != 1 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    scale = options.get("scaling") or size**-0.5
    if row_cache.decode_plan is None:
        output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
    else:
        output = _shared_attention(
            grouped * scale, key, value, mask=attention_mask, cache=row_cache, layer=module.layer_idx
        )
    return output.reshape(batch, 1, heads, value.shape[3]), None


def _shared_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor,
    cache: RowCache,
    layer: int,
) -> torch.Tensor:
    """One softmax over an entry's shared prompt and its own row. The prompt is read once for all entries
    that share it.

    query: [m, heads, g, d], scaled. key, value: own rows [m, heads, width, d]. mask: [m, 1, 1, shared width
    + width], additive.
    """
    plan = cache.decode_plan
    shared_keys, shared_values = cache.shared_prompts(layer)
    shared_width = shared_keys.shape[2]
    shared_scores = plan.to_entries(plan.to_prompts(query) @ shared_keys.transpose(2, 3))
    scores = torch.cat([shared_scores, query @ key.transpose(2, 3)], dim=-1) + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    shared_output = plan.to_entries(plan.to_prompts(weights[..., :shared_width]) @ shared_values)
    own_output = weights[..., shared_width:] @ value
    return torch.where(plan.shares[:, None, None, None], own_output + shared_output, own_output)


AttentionInterface.register(ATTENTION, row_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
