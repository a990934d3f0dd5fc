"""The DeepSpeed configuration, as a pure function of ours."""

from __future__ import annotations

from typing import Any

from megatron_sd.config import Config

PERSISTENT_PARAMETER_ELEMENTS = 100_000  # smaller parameters (norms, biases) stay gathered between steps
REDUCE_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize gets for the trained policy.

    Accumulation is ours: any number of microbatches between two steps, losses already divided by global totals. Gradients
    accumulate in float32. DeepSpeed clips by the global norm and skips a step whose norm is not finite, at any stage but 0.
    """
    return {
        **_common(config, world_size),
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.max_grad_norm if config.update.zero_stage else 0.0,  # else: ClippedAdamW
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(config.update.zero_stage),
    }


def reference_config(config: Config, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize gets for a frozen policy without optimiser; ZeRO-3 is the only stage that shards one."""
    return {**_common(config, world_size), "zero_optimization": _zero(3)}


def teacher_config(config: Config, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize gets for a teacher with weights of its own; none is kept gathered, since an average moves."""
    return {**_common(config, world_size), "zero_optimization": _zero(3) | {"stage3_param_persistence_threshold": 0}}


def _common(config: Config, world_size: int) -> dict[str, Any]:
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _zero(stage: int) -> dict[str, Any]:
    sharded = {
        "stage3_param_persistence_threshold": PERSISTENT_PARAMETER_ELEMENTS,
        "stage3_gather_16bit_weights_on_model_save": False,
        "memory_efficient_linear": False,  # would replace torch's linear everywhere for good: placement.zero3_linear
    }
    return {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        **(sharded if stage == 3 else {}),
    }
