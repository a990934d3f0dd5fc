"""The DeepSpeed configuration, as a pure function of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sd.config import OptimizerConfig, UpdateConfig
from megatron_sd.training.parallel.tensor import autotp_settings

PERSISTENT_PARAMETER_ELEMENTS = 100_000  # smaller parameters (norms, biases) stay gathered between steps
# the optimiser steps over so many at a time (or over one parameter, if larger)
SUB_GROUP_ELEMENTS = 50_000_000
_LIVE_LAYERS = 3  # gathered at one time: the one that computes, the one that comes, the one that was
_DEEPSPEEDS_LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class CommunicationSizes:
    """Elements that ZeRO-3 moves at one time. Layers are gathered whole (placement.gather_layers_whole), so
    between GPUs, where they travel while others compute, sizes follow from the largest layer: less would leave
    the rest of it exposed. On hosts nothing overlaps, and memory counts: a few layers live, and what comes is
    gathered when it is there."""

    prefetch: int  # gathered ahead of its use
    live: int  # gathered and not yet given back
    reduce_bucket: int  # gradients reduced in one call

    @classmethod
    def of(cls, layer: int, device_type: str) -> CommunicationSizes:
        """layer: elements of the largest decoder layer. device_type: "cuda" or "cpu"."""
        if device_type == "cpu":
            return cls(prefetch=layer, live=_LIVE_LAYERS * layer, reduce_bucket=8_000_000)
        return cls(
            prefetch=max(50_000_000, layer * 6 // 5),
            live=max(_DEEPSPEEDS_LIVE_ELEMENTS, _LIVE_LAYERS * layer),
            reduce_bucket=max(50_000_000, layer),
        )


def deepspeed_config(
    update: UpdateConfig,
    optimizer: OptimizerConfig,
    *,
    dtype: str,
    world_size: int,
    device_type: str,
    layer: int,
) -> dict[str, Any]:
    """What deepspeed.initialize gets for the trained policy. dtype: of its weights, as model.dtype.
    device_type, layer: as CommunicationSizes has them.

    Accumulation is ours: any number of microbatches between two steps, losses already divided by global
    totals. Gradients accumulate in float32. DeepSpeed clips by the global norm and skips a step whose norm
    is not finite, at any stage but 0.
    """
    return {
        **_common(dtype, world_size),
        "managed_gradient_accumulation": False,
        # else: ClippedAdamW
        "gradient_clipping": optimizer.max_grad_norm if update.zero_stage else 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(update.zero_stage, device_type, layer) | _offload(update),
        **autotp_settings(update.tensor_parallel_size),
        # torch's AdamW steps in host memory, too: DeepSpeed's own needs a compiler
        "zero_force_ds_cpu_optimizer": False,
    }


def reference_config(*, dtype: str, world_size: int, device_type: str, layer: int) -> dict[str, Any]:
    """What deepspeed.initialize gets for a frozen policy without optimiser; ZeRO-3 is the only stage that
    shards one."""
    return {**_common(dtype, world_size), "zero_optimization": _zero(3, device_type, layer)}


def teacher_config(*, dtype: str, world_size: int, device_type: str, layer: int) -> dict[str, Any]:
    """What deepspeed.initialize gets for a teacher with weights of its own; none is kept gathered, since an
    average moves."""
    return {
        **_common(dtype, world_size),
        "zero_optimization": _zero(3, device_type, layer) | {"stage3_param_persistence_threshold": 0},
    }


def _offload(update: UpdateConfig) -> dict[str, Any]:
    """Where the optimiser's state and, between uses, the weights' shards are."""
    sections: dict[str, Any] = {}
    if update.offload_optimizer != "none":
        place = {"nvme_path": update.nvme_path} if update.offload_optimizer == "nvme" else {}
        sections["offload_optimizer"] = {"device": update.offload_optimizer, "pin_memory": False, **place}
    if update.offload_parameters != "none":
        sections["offload_param"] = {"device": update.offload_parameters, "pin_memory": False}
    return sections


def _common(dtype: str, world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _zero(stage: int, device_type: str, layer: int) -> dict[str, Any]:
    sizes = CommunicationSizes.of(layer, device_type)
    sharded = {
        "stage3_prefetch_bucket_size": sizes.prefetch,
        "stage3_max_live_parameters": sizes.live,
        # what is used again sooner stays gathered
        "stage3_max_reuse_distance": min(sizes.live, _DEEPSPEEDS_LIVE_ELEMENTS),
        "sub_group_size": SUB_GROUP_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENT_PARAMETER_ELEMENTS,
        "stage3_gather_16bit_weights_on_model_save": False,
        # would replace torch's linear everywhere for good: placement.zero3_linear
        "memory_efficient_linear": False,
    }
    return {
        "stage": stage,
        "overlap_comm": device_type == "cuda",  # a stream of its own
        "contiguous_gradients": True,
        "reduce_bucket_size": sizes.reduce_bucket,
        **(sharded if stage == 3 else {}),
    }
