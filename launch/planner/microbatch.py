"""The largest microbatch that the planner says fits, and `update.max_microbatch_tokens auto`, which stands for
it: a number before any rank starts. A run that goes on from a checkpoint keeps the number it has."""

from __future__ import annotations

from pathlib import Path

import yaml

from launch.cluster.layout import LayoutConfig, ranks_per_node
from launch.planner.gpus import find_gpu
from launch.planner.memory import GIB, RESERVED_GIB
from launch.planner.memory_check import needed_bytes, with_microbatch
from launch.planner.models import model_config
from megatron_sd.config import AUTO, Config
from megatron_sd.durable.directories import committed
from megatron_sd.errors import ConfigError
from megatron_sd.observability.names import CONFIG_NAME
from megatron_sd.resharding.names import DecoderSizes, UnknownArchitectureError, model_shape

KEY = "update.max_microbatch_tokens"
MICROBATCHES = tuple(1 << power for power in range(9, 18))  # tokens, of which the largest that fits is told
USED_SHARE = 0.85  # of the free memory, by auto: plans are within 15 % of what was measured


def largest_microbatch(
    shape: DecoderSizes, config: Config, num_ranks: int, *, free: float, on_cpu: bool
) -> int | None:
    """The largest of MICROBATCHES with which no more is needed than the bytes that are free (memory_check.py
    says of what); None where the smallest is too large."""
    fitting = (
        tokens
        for tokens in MICROBATCHES
        if needed_bytes(shape, with_microbatch(config, tokens), num_ranks, on_cpu=on_cpu)[0] <= free
    )
    return max(fitting, default=None)


def settle_auto(config: Config, *, num_ranks: int, device_bytes: float, on_cpu: bool) -> list[str]:
    """The option that `auto` stands for.

    device_bytes: of one GPU, or on CPUs the host memory that all ranks share. Raises ConfigError when not
    even the smallest microbatch fits, or when the model's family is not described.
    """
    free = device_bytes - (0.0 if on_cpu else RESERVED_GIB * GIB)
    tokens = _of_checkpoint(Path(config.run_dir))
    if tokens is None:
        try:
            shape = model_shape(model_config(config.model.path))
        except UnknownArchitectureError as error:
            raise ConfigError(
                f"{KEY}: found auto, expected a number of tokens for this model: {error}"
            ) from error
        tokens = largest_microbatch(shape, config, num_ranks, free=USED_SHARE * free, on_cpu=on_cpu)
    if tokens is None:
        raise ConfigError(
            f"{KEY}: found auto, but no microbatch fits {USED_SHARE:.0%} of {free / GIB:.1f} GiB; expected room"
            " for one: model.lora.rank, model.gradient_checkpointing, rollout.max_concurrent_sequences or a"
            " smaller model; `sd-search plan` lists what is held"
        )
    return [f"--{KEY}={tokens}"]


def settle_on_nodes(layout: LayoutConfig, config: Config) -> list[str]:
    """The same on a layout's GPUs; nothing where a number was asked for. Raises ConfigError for a kind of GPU
    that nobody knows, and for nodes without GPUs, too."""
    if config.update.max_microbatch_tokens != AUTO or layout.nodes == 0:
        return []
    if layout.gpus_per_node == 0:
        raise ConfigError(
            f"{KEY}: found auto for nodes without GPUs, expected a number, since nobody knows their memory here"
        )
    world_size = layout.nodes * ranks_per_node(layout, config)
    device_bytes = find_gpu(layout.gpu).memory_gib * GIB
    return settle_auto(config, num_ranks=world_size, device_bytes=device_bytes, on_cpu=False)


def _of_checkpoint(run_dir: Path) -> int | None:
    """What a run with a checkpoint was started with. Raises ConfigError where its file does not say it."""
    path = run_dir / CONFIG_NAME
    if not committed(run_dir / "checkpoints") or not path.is_file():
        return None
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["update"]["max_microbatch_tokens"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{KEY}: auto goes on with the number that the run was started with, and {path} does not say it"
            f" ({type(error).__name__}: {error}), expected the file that the run wrote; give the number"
        ) from error
