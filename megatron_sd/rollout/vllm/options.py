"""How vLLM is started, as a server or in a rank's process: options and environment, pure. What cannot work
is refused before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sd.config import ModelConfig, RolloutConfig
from megatron_sd.errors import ConfigError, DataError

BACKEND = "megatron_sd"  # the name of our weight-transfer backend in vLLM's factory
CPU_BATCH_TOKENS = 2048  # of one forward pass on a CPU
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What serving needs to know of a model directory's config.json."""

    architecture: str
    vocabulary_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    # that one conversation may hold; None: stretched by a rope scaling, vLLM knows how far
    positions: int | None = None

    @classmethod
    def read(cls, path: str) -> ServedModel:
        """Raises DataError when the directory has no config.json of a causal language model."""
        try:
            found = read_description(path)
            num_heads = found["num_attention_heads"]
            return cls(
                architecture=found["architectures"][0],
                vocabulary_size=found["vocab_size"],
                num_layers=found["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=found.get("num_key_value_heads") or num_heads,
                head_dim=found.get("head_dim") or found["hidden_size"] // num_heads,
                tied=found.get("tie_word_embeddings", True),
                positions=_positions(found),
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"model.path: cannot read {path}/config.json ({error!r}), expected the directory of a causal"
                " language model"
            ) from error

    def kv_bytes_per_token(self, *, dtype: str, tensor_parallel_size: int) -> int:
        """Of keys and values in one worker."""
        heads = max(self.num_kv_heads // tensor_parallel_size, 1)
        return 2 * self.num_layers * heads * self.head_dim * _ITEM_BYTES[dtype]


def _positions(description: Mapping[str, Any]) -> int | None:
    rope = description.get("rope_scaling") or description.get("rope_parameters") or {}
    is_stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
    return None if is_stretched else description.get("max_position_embeddings")


def read_description(path: str) -> dict[str, Any]:
    """A model directory's config.json."""
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))


def check_server(shape: ServedModel, model: ModelConfig, rollout: RolloutConfig, *, on_cpu: bool) -> None:
    """Raise ConfigError for what vLLM would refuse, or die of, after a minute of starting up."""
    own, size = rollout.vllm, rollout.vllm.tensor_parallel_size
    if shape.positions is not None and rollout.max_rollout_tokens > shape.positions:
        raise ConfigError(
            f"rollout.max_rollout_tokens is {rollout.max_rollout_tokens}, expected at most {shape.positions},"
            f" the positions of the model in {model.path}"
        )
    if shape.num_heads % size or (shape.num_kv_heads % size and size % shape.num_kv_heads):
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size: found {size}, expected a divisor of the {shape.num_heads}"
            f" attention heads of {model.path} that divides its {shape.num_kv_heads} key-value heads or is a"
            " multiple of them"
        )
    if own.placement == "colocated" and (own.devices or own.num_replicas != 1 or own.kv_cache_gib is None):
        raise ConfigError(
            f"rollout.vllm.placement: found colocated with devices {list(own.devices)}, num_replicas"
            f" {own.num_replicas} and kv_cache_gib {own.kv_cache_gib}, expected no devices and 1 replica,"
            " since ranks share their own GPUs, and a number of GiB, since the trainer needs the rest"
        )
    if own.devices and len(own.devices) != own.num_replicas * size:
        raise ConfigError(
            f"rollout.vllm.devices: found {len(own.devices)} GPUs, expected num_replicas x"
            f" tensor_parallel_size = {own.num_replicas} x {size}, or none to take those that vLLM sees"
        )
    if own.kv_cache_gib is None:
        if on_cpu:
            raise ConfigError(
                "rollout.vllm.kv_cache_gib: found null, expected a number on a machine without a GPU, where"
                " vLLM would take nearly all memory"
            )
        return
    needed = (
        rollout.max_rollout_tokens
        * shape.kv_bytes_per_token(dtype=model.dtype, tensor_parallel_size=size)
        / 2**30
    )
    if own.kv_cache_gib < needed:
        raise ConfigError(
            f"rollout.vllm.kv_cache_gib: found {own.kv_cache_gib:g}, expected at least {needed:.3g}, which"
            f" one rollout of rollout.max_rollout_tokens {rollout.max_rollout_tokens} needs, and several"
            " times that for many at once"
        )


def engine_options(
    model: ModelConfig, rollout: RolloutConfig, *, on_cpu: bool, share: float | None = None
) -> dict[str, Any]:
    """vLLM's EngineArgs for this policy, wherever it runs. share: of the GPU's memory, instead of
    gpu_memory_share (memory.py).

    The log-probabilities are those of the distribution that is sampled from, and the model's own generation
    settings (top-p, repetition penalties) are not applied: GRPO's ratio needs both.
    """
    own = rollout.vllm
    options: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "max_model_len": rollout.max_rollout_tokens,
        "max_num_seqs": rollout.max_concurrent_sequences,
        "tensor_parallel_size": own.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "worker_extension_cls": "megatron_sd.rollout.vllm.weight_worker.WeightTaker",
        "weight_transfer_config": {"backend": BACKEND},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if own.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(own.kv_cache_gib * 2**30)
    else:
        options["gpu_memory_utilization"] = own.gpu_memory_share if share is None else share
    if own.block_tokens is not None:
        options["block_size"] = own.block_tokens
    if on_cpu:
        # A seeded prompt that is prefilled in chunks takes a draw back, which vLLM 0.32 cannot do with a
        # CPU's generator.
        options |= {"enforce_eager": True, "enable_chunked_prefill": False}
        options["max_num_batched_tokens"] = max(CPU_BATCH_TOKENS, rollout.max_rollout_tokens)
    return options


def server_arguments(
    model: ModelConfig,
    rollout: RolloutConfig,
    *,
    host: str,
    port: int,
    on_cpu: bool,
    share: float | None = None,
) -> list[str]:
    """Command line of `megatron_sd.rollout.vllm.server_main` for this policy."""
    options = engine_options(model, rollout, on_cpu=on_cpu, share=share) | {
        "host": host,
        "port": port,
        "enable_scale_out": True,
        "enable_prompt_tokens_details": True,
        "disable_uvicorn_access_log": True,
    }
    if on_cpu:
        options["distributed_executor_backend"] = "uni" if rollout.vllm.tensor_parallel_size == 1 else "mp"
    return [text for name, value in options.items() for text in _argument(name.replace("_", "-"), value)]


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def server_environment(
    inherited: Mapping[str, str], rollout: RolloutConfig, *, replica: int, on_cpu: bool
) -> dict[str, str]:
    """Of a server process, from that of this one: with vLLM's routes for reinforcement learning, without
    network look-ups."""
    own, size = rollout.vllm, rollout.vllm.tensor_parallel_size
    environment = {**inherited, **engine_environment(on_cpu=on_cpu), "VLLM_SERVER_DEV_MODE": "1"}
    if own.devices:
        mine = own.devices[replica * size : (replica + 1) * size]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
    if on_cpu:
        environment["OMP_NUM_THREADS"] = str(own.threads_per_worker)
        if size == 1:  # or vLLM gives a single worker a process of its own, too
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def engine_environment(*, on_cpu: bool) -> dict[str, str]:
    """Variables that vLLM reads, wherever it runs."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return environment | (
        {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"} if on_cpu else {}
    )


def describe(shape: ServedModel, model: ModelConfig) -> dict[str, Any]:
    """What engine and trainer must have in common, as the worker compares it (weight_worker.differences)."""
    return {
        "architecture": shape.architecture,
        "vocabulary_size": shape.vocabulary_size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tied": shape.tied,
        "dtype": model.dtype,
    }
