"""Groups of neighbouring ranks that share the work of one microbatch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sd.distributed.collectives import gather_tensors
from megatron_sd.distributed.world import World
from megatron_sd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """This rank's place among `size` ranks. processes: None where the rank is alone."""

    rank: int
    size: int
    processes: dist.ProcessGroup | None


def neighbours(
    world: World, size: int, key: str, *, backend: str | None = None, timeout: timedelta | None = None
) -> RankGroup:
    """The group of this rank when ranks [0, size), [size, 2 size), ... share their work. Collective at the
    first call for a size.

    key: the configuration key that asks for it. backend, timeout: where they are not the world's own.
    Raises ConfigError when the ranks do not divide into such groups.
    """
    if world.size % size:
        raise ConfigError(f"{key}: found {size} for {world.size} ranks, expected a divisor of their number")
    processes = None if size == 1 else _groups(world.size, size, backend, timeout)[world.rank // size]
    return RankGroup(rank=world.rank % size, size=size, processes=processes)


def joined_slices(own: Tensor, group: RankGroup) -> Tensor:
    """[B, s, ...] of each rank -> [B, ranks * s, ...], the slices in rank order. Differentiable: a slice's
    gradient is the sum of what all ranks have for it."""
    return _JoinedSlices.apply(own, group)


@functools.lru_cache(maxsize=8)
def _groups(
    world_size: int, size: int, backend: str | None, timeout: timedelta | None
) -> list[dist.ProcessGroup]:
    starts = range(0, world_size, size)
    return [
        dist.new_group(list(range(start, start + size)), backend=backend, timeout=timeout) for start in starts
    ]


class _JoinedSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return gather_tensors(own, group.processes).movedim(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        mine = gradient.unflatten(1, (ctx.group.size, -1)).movedim(1, 0).contiguous()
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=ctx.group.processes)
        return received.sum(0), None
