"""Several ranks that are one tensor-parallel engine: each has its own rollouts, and all make the same calls in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sd.distributed.world import World
from megatron_sd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class News:
    """What a rank tells its peers before a step of the engine. requests: (key, whatever describes it); aborted: keys."""

    requests: tuple[tuple[str, Any], ...] = ()
    aborted: tuple[str, ...] = ()
    leaves: bool = False  # it will send no further request of this batch


class Lockstep:
    """Groups of `size` neighbouring ranks. Collective: every rank of the world makes one.

    number: of this rank's group among num_groups. Raises ConfigError when the groups do not come out even.
    """

    def __init__(self, world: World, size: int, *, timeout_s: float):
        if world.size % size:
            raise ConfigError(
                f"rollout.vllm.tensor_parallel_size: found {size} with placement colocated on {world.size} ranks, expected a "
                "divisor of their number: that many ranks share an engine"
            )
        self.number, self.num_groups = world.rank // size, world.size // size
        self._size = size
        self._group = None
        if size > 1:
            timeout = timedelta(seconds=timeout_s)
            groups = [
                dist.new_group(list(range(first, first + size)), timeout=timeout, backend="gloo")
                for first in range(0, world.size, size)
            ]
            self._group = groups[self.number]

    def exchange(self, news: News) -> tuple[list[News], bool]:
        """The news of all ranks of the group, in rank order, and whether all of them leave.

        Most steps bring none: they cost one sum over two numbers.
        """
        if self._group is None:
            return [news], news.leaves
        counts = torch.tensor([len(news.requests) + len(news.aborted), int(news.leaves)])
        dist.all_reduce(counts, group=self._group)
        num_news, num_leaving = counts.tolist()
        parts = [news]
        if num_news:
            parts = [None] * self._size
            dist.all_gather_object(parts, news, group=self._group)
        return parts, num_leaving == self._size
