"""`sd-search plan --this-machine`: which ways of training a model fit the memory that is free here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from launch.cluster.job import Job, Program
from launch.local import free_bytes
from launch.planner.memory import GIB, RESERVED_GIB, Sizes
from launch.planner.memory_check import LORA_RANK, needed_bytes, with_microbatch
from launch.planner.microbatch import MICROBATCHES, USED_SHARE, largest_microbatch
from megatron_sd.config import AUTO, Config
from megatron_sd.errors import ConfigError
from megatron_sd.machine import has_gpu
from megatron_sd.resharding.names import DecoderSizes, model_shape

BLANKS: Mapping[Program, Mapping[str, str]] = {
    "train": {"--run_dir": "none", "--data.train": "none", "--retriever.corpus": "none"},
    "sft": {"--run_dir": "none", "--episodes": "none"},
}
MOST_COLUMNS = 3


def plan_here(job: Job, description: Mapping[str, Any]) -> str:
    """The table that is printed; description: the model's config.json. Raises ConfigError where the free
    memory cannot be told, UnknownArchitectureError for a family that is not described."""
    free = free_bytes()
    if free is None:
        raise ConfigError(
            "this_machine: nvidia-smi does not say how much memory the GPUs have free, expected it to work"
            " here"
        )
    return render(job, model_shape(description), free=free, on_cpu=not has_gpu(), num_places=num_places())


def num_places() -> int:
    """Ranks that this machine has room for: its GPUs, or its cores."""
    if not has_gpu():
        return os.cpu_count() or 1
    import torch

    return max(torch.cuda.device_count(), 1)


def render(job: Job, shape: DecoderSizes, *, free: int, on_cpu: bool, num_places: int) -> str:
    """Ways of training down, numbers of ranks across; in each place the planned memory, and the largest
    microbatch that fits.

    free: bytes, of the machine's memory on CPUs, which all ranks share, else of the fullest GPU.
    """
    config = job.config
    free -= 0 if on_cpu else int(RESERVED_GIB * GIB)
    ranks = [number for number in (1, 2, 4, 8) if number <= num_places][-MOST_COLUMNS:]
    where = f"{num_places} cores, {free / GIB:.1f} GiB of host memory free for all ranks together"
    if not on_cpu:
        where = f"{num_places} GPUs, {free / GIB:.1f} GiB free on the fullest"
    rows = [
        [words, *(_place(own, shape, number, free=free, on_cpu=on_cpu) for number in ranks)]
        for words, own in ways(config)
    ]
    heads = ["", *(f"{number} rank{'s' if number > 1 else ''}" for number in ranks)]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (heads, *rows)
    ]
    microbatches = f"microbatches of {config.update.max_microbatch_tokens} tokens"
    if config.update.max_microbatch_tokens == AUTO:
        microbatches = "the microbatches that auto takes"
    size = f"{config.rollout.questions_per_step * config.rollout.group_size} rollouts"
    if job.program == "sft":
        size = f"{job.batch[1]} episodes"
    return "\n".join(
        [
            f"{Sizes.of(shape).total / 1e9:.2f} G parameters in {config.model.dtype}; this machine: {where}",
            (
                f"planned GiB at the worst moment of a step of {size}, with {microbatches};"
                " in brackets the largest microbatch that fits"
            ),
            "",
            *lines,
        ]
    )


def ways(config: Config) -> Iterator[tuple[str, Config]]:
    """All parameters or adapters, without and with gradient checkpointing."""
    replace = dataclasses.replace
    lora = replace(config.model.lora, rank=config.model.lora.rank or LORA_RANK)
    for words, rank in (("full", replace(config.model.lora, rank=0)), (f"model.lora.rank {lora.rank}", lora)):
        for more, checkpoints in (("", False), (", model.gradient_checkpointing", True)):
            model = replace(config.model, lora=rank, gradient_checkpointing=checkpoints)
            yield words + more, replace(config, model=model)


def _place(config: Config, shape: DecoderSizes, num_ranks: int, *, free: float, on_cpu: bool) -> str:
    def largest(share: float) -> int | None:
        return largest_microbatch(shape, config, num_ranks, free=share * free, on_cpu=on_cpu)

    tokens = config.update.max_microbatch_tokens
    own = with_microbatch(config, largest(USED_SHARE) or MICROBATCHES[0]) if tokens == AUTO else config
    fitting, size = largest(1.0), needed_bytes(shape, own, num_ranks, on_cpu=on_cpu)[0]
    verdict = "fits" if size <= free else "no"
    return f"{size / GIB:.1f} {verdict} ({'none' if fitting is None else f'{fitting:,}'})"
