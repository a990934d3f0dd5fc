"""`update.max_microbatch_tokens auto`: the largest microbatch that the planner says fits, as a number, before
any rank starts. A run that goes on from a checkpoint keeps the number it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from launch.cluster.layout import LayoutConfig, ranks_per_node
from launch.planner.gpus import find_gpu
from launch.planner.memory import GIB, RESERVED_GIB, largest_microbatch, peak, rank_memory
from launch.planner.memory_check import needed_bytes
from launch.planner.models import model_config
from megatron_sd.config import AUTO, Config
from megatron_sd.durable.directories import committed
from megatron_sd.errors import ConfigError
from megatron_sd.observability.names import CONFIG_NAME
from megatron_sd.resharding.names import DecoderSizes, UnknownArchitectureError, model_shape

KEY = "update.max_microbatch_tokens"
USED_SHARE = 0.85  # of the free memory, since plans are within 15 % of what was measured


def words_here(config: Config, *, num_ranks: int, device_bytes: int, on_cpu: bool) -> list[str]:
    """The option that settles `auto` on this machine; none where a number was asked for.

    device_bytes: free, of one GPU, or on CPUs of the host memory that all ranks share. Raises ConfigError
    when not even the smallest microbatch fits, or when the model's family is not described.
    """
    free = device_bytes - (0.0 if on_cpu else RESERVED_GIB * GIB)
    return _words(
        config, free, lambda shape, own: needed_bytes(shape, own, num_ranks, on_cpu=on_cpu)[0], "free here"
    )


def words_on_nodes(layout: LayoutConfig, config: Config) -> list[str]:
    """The same on a layout's GPUs. Raises ConfigError for a kind of GPU that nobody knows, and for nodes
    without GPUs, too."""
    if config.update.max_microbatch_tokens != AUTO or layout.nodes == 0:
        return []
    if layout.gpus_per_node == 0:
        raise ConfigError(
            f"{KEY}: found auto for nodes without GPUs, expected a number, since nobody knows their memory here"
        )
    world_size = layout.nodes * ranks_per_node(layout, config)
    free = (find_gpu(layout.gpu).memory_gib - RESERVED_GIB) * GIB
    return _words(
        config,
        free,
        lambda shape, own: peak(rank_memory(shape, own, world_size=world_size))[0],
        f"of a {layout.gpu}",
    )


def _words(
    config: Config, free: float, needed: Callable[[DecoderSizes, Config], float], where: str
) -> list[str]:
    if config.update.max_microbatch_tokens != AUTO:
        return []
    tokens = _of_checkpoint(Path(config.run_dir))
    if tokens is None:
        try:
            shape = model_shape(model_config(config.model.path))
        except UnknownArchitectureError as error:
            raise ConfigError(
                f"{KEY}: found auto, expected a number of tokens for this model: {error}"
            ) from error
        tokens = largest_microbatch(config, lambda own: needed(shape, own), USED_SHARE * free)
    if tokens is None:
        raise ConfigError(
            f"{KEY}: found auto, but no microbatch fits {USED_SHARE:.0%} of the {free / GIB:.1f} GiB {where};"
            " expected room for one: model.lora.rank, model.gradient_checkpointing,"
            " rollout.max_concurrent_sequences or a smaller model; `sd-search plan` lists what is held"
        )
    return [f"--{KEY}={tokens}"]


def _of_checkpoint(run_dir: Path) -> int | None:
    """What a run with a checkpoint was started with."""
    path = run_dir / CONFIG_NAME
    if not committed(run_dir / "checkpoints") or not path.is_file():
        return None
    return int(yaml.safe_load(path.read_text(encoding="utf-8"))["update"]["max_microbatch_tokens"])
