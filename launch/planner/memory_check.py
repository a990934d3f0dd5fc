"""What a run is planned to take against what there is, in words, for the doors that start ranks on one
machine: pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from launch.planner.memory import GIB, RESERVED_GIB, peak, rank_memory
from launch.planner.models import model_config
from megatron_sd.config import Config
from megatron_sd.config.checks import check
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import DecoderSizes, UnknownArchitectureError, model_shape

SMALLEST_MICROBATCH = 1024
LORA_RANK = 16
MOST_RANKS = 1024


def remarks_on_memory(config: Config, *, num_ranks: int, device_bytes: int, on_cpu: bool) -> tuple[str, ...]:
    """What is planned, what there is and what would fit; empty when it fits.

    device_bytes: of one GPU, or on CPUs the host memory of the machine, which all its ranks share. Raises
    ConfigError or DataError for a model whose sizes cannot be read.
    """
    try:
        shape = model_shape(model_config(config.model.path))
    except UnknownArchitectureError as error:
        return (f"memory is not checked: {error}",)
    free = device_bytes - (0.0 if on_cpu else RESERVED_GIB * GIB)
    needed, phase = needed_bytes(shape, config, num_ranks, on_cpu=on_cpu)
    if needed <= free:
        return ()
    whose = f"{num_ranks} ranks together" if on_cpu else "a rank"
    there = f"{free / GIB:.1f} GiB of host memory" if on_cpu else f"{free / GIB:.1f} GiB of its GPU"
    found = f"memory: planned {needed / GIB:.1f} GiB for {whose} at the worst moment ({phase}), found {there}"
    sized = [
        (words, needed_bytes(shape, c, n, on_cpu=on_cpu)[0])
        for words, c, n in _variants(config, num_ranks, on_cpu=on_cpu)
    ]
    fitting, families = [], set()
    for words, size in sized:  # the first that fits of each kind: the smallest change
        family = words.split(" ")[0]
        if size <= free and family not in families:
            families.add(family)
            fitting.append(f"{words} ({size / GIB:.1f} GiB)")
    if fitting:
        return (found, f"each of these alone would fit: {'; '.join(fitting)}")
    best, size = min(sized, key=lambda variant: variant[1])
    return (
        found,
        f"no single change fits; the best is {best} ({size / GIB:.1f} GiB): take several, or a smaller model",
    )


def needed_bytes(shape: DecoderSizes, config: Config, num_ranks: int, *, on_cpu: bool) -> tuple[float, str]:
    """Bytes of a rank on its device at the worst moment; on CPUs of all ranks, with what they hold in host
    memory."""
    parts = rank_memory(shape, config, world_size=num_ranks, on_gpu=not on_cpu)
    if on_cpu:
        parts = tuple(dataclasses.replace(part, where="device") for part in parts)
    needed, phase = peak(parts)
    return needed * (num_ranks if on_cpu else 1), phase


def with_microbatch(config: Config, tokens: int) -> Config:
    """The run with another update.max_microbatch_tokens."""
    update = dataclasses.replace(config.update, max_microbatch_tokens=tokens)
    return dataclasses.replace(config, update=update)


def _variants(config: Config, num_ranks: int, *, on_cpu: bool) -> Iterator[tuple[str, Config, int]]:
    """Changes that lower the memory, those that cost least first: words, the run with it, its ranks."""
    for words, changed in _smaller_runs(config, on_cpu=on_cpu):
        try:
            check(changed)
        except ConfigError:  # not with the rest of this run
            continue
        yield words, changed, num_ranks
    more = 2 * num_ranks
    while not on_cpu and more <= MOST_RANKS:
        yield f"ranks: {more} instead of {num_ranks}", config, more
        more *= 2


def _smaller_runs(config: Config, *, on_cpu: bool) -> Iterator[tuple[str, Config]]:
    replace = dataclasses.replace
    model, update = config.model, config.update
    if not model.gradient_checkpointing:
        yield (
            "model.gradient_checkpointing true",
            replace(config, model=replace(model, gradient_checkpointing=True)),
        )
    tokens = update.microbatch_tokens // 2
    while tokens >= SMALLEST_MICROBATCH:
        yield f"update.max_microbatch_tokens {tokens}", with_microbatch(config, tokens)
        tokens //= 2
    if not on_cpu and update.offload_optimizer == "none":
        yield "update.offload_optimizer cpu", replace(config, update=replace(update, offload_optimizer="cpu"))
    if not model.lora.rank:
        lora = replace(model.lora, rank=LORA_RANK)
        yield f"model.lora.rank {LORA_RANK}", replace(config, model=replace(model, lora=lora))
    sequences = config.rollout.max_concurrent_sequences // 2
    while config.rollout.engine == "torch" and sequences >= 1:
        rollout = replace(config.rollout, max_concurrent_sequences=sequences)
        yield f"rollout.max_concurrent_sequences {sequences}", replace(config, rollout=rollout)
        sequences //= 2
