"""What a vLLM worker holds on its GPU beside what is published into it: pure arithmetic, and what cannot fit.

A publish of shards stages a second copy of the worker's shard there, and keeps that memory. vLLM fills
whatever share of the card it is told, so the staged copy is taken out of that share before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sd.config import ModelConfig, RolloutConfig
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import UnknownArchitectureError, worker_layouts
from megatron_sd.resharding.plan import ITEM_BYTES
from megatron_sd.resharding.staging import num_staged

GIB = 2**30
# of one forward pass and its captured graphs, which vLLM takes before it counts keys and values
WORKING_GIB = 2.0


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker: its weights, the staged copy of the next ones, keys and values of one longest
    rollout."""

    weights: int
    staged: int
    rollout: int


def worker_memory(
    description: Mapping[str, Any], model: ModelConfig, rollout: RolloutConfig
) -> WorkerMemory | None:
    """Of the largest worker; None for a family without a shard layout, whose weights vLLM loads.
    description: config.json."""
    own, item = rollout.vllm, ITEM_BYTES[model.dtype]
    try:
        layouts = worker_layouts(description, tp_size=own.tensor_parallel_size, dtype=model.dtype)
    except UnknownArchitectureError:
        return None
    heads, layers = description["num_attention_heads"], description["num_hidden_layers"]
    kv_heads = max((description.get("num_key_value_heads") or heads) // own.tensor_parallel_size, 1)
    head_dim = description.get("head_dim") or description["hidden_size"] // heads
    staged = max(map(num_staged, layouts)) * item if own.publishes_shards else 0
    return WorkerMemory(
        weights=max(layout.numel for layout in layouts) * item,
        staged=staged,
        rollout=2 * layers * kv_heads * head_dim * item * rollout.max_rollout_tokens,
    )


def memory_share(memory: WorkerMemory, rollout: RolloutConfig, *, device_bytes: float) -> float:
    """vLLM's gpu_memory_utilization: gpu_memory_share less the staged copy. Raises ConfigError when
    weights, one forward pass and one rollout do not fit in what is left."""
    own = rollout.vllm
    needed = memory.weights + memory.rollout + WORKING_GIB * GIB
    if own.kv_cache_gib is not None:
        needed += own.kv_cache_gib * GIB - memory.rollout
    left = own.gpu_memory_share * device_bytes - memory.staged
    if left < needed:
        raise ConfigError(
            f"rollout.vllm.gpu_memory_share: found {own.gpu_memory_share:g} of {device_bytes / GIB:.1f} GiB,"
            f" of which a publish stages {memory.staged / GIB:.1f} and {left / GIB:.1f} are left, expected"
            f" {needed / GIB:.1f} or more for weights ({memory.weights / GIB:.1f}), keys and values and a"
            " forward pass: raise rollout.vllm.tensor_parallel_size, lower kv_cache_gib or"
            " max_rollout_tokens, or set rollout.vllm.publish gather, which stages nothing"
        )
    return round(left / device_bytes, 4)
