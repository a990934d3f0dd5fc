"""Several ranks that are one tensor-parallel engine: each has its own rollouts, and all make the same calls
in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sd.distributed.groups import neighbours
from megatron_sd.distributed.world import World


@dataclass(frozen=True, kw_only=True)
class News:
    """What a rank tells its peers before a step of the engine. requests: (key, whatever describes it);
    aborted: keys."""

    requests: tuple[tuple[str, Any], ...] = ()
    aborted: tuple[str, ...] = ()
    leaves: bool = False  # it will send no further request of this batch


class Lockstep:
    """Groups of `size` neighbouring ranks. Collective: every rank of the world makes one.

    number: of this rank's group among num_groups. Raises ConfigError when the groups do not come out even.
    """

    def __init__(self, world: World, size: int, *, timeout_s: float):
        key, timeout = "rollout.vllm.tensor_parallel_size", timedelta(seconds=timeout_s)
        self._group = neighbours(world, size, key, backend="gloo", timeout=timeout)
        self.number, self.num_groups = world.rank // size, world.size // size

    def exchange(self, news: News) -> tuple[list[News], bool]:
        """The news of all ranks of the group, in rank order, and whether all of them leave.

        Most steps bring none: they cost one sum over two numbers.
        """
        if self._group.processes is None:
            return [news], news.leaves
        counts = torch.tensor([len(news.requests) + len(news.aborted), int(news.leaves)])
        dist.all_reduce(counts, group=self._group.processes)
        num_news, num_leaving = counts.tolist()
        parts = [news]
        if num_news:
            parts = [None] * self._group.size
            dist.all_gather_object(parts, news, group=self._group.processes)
        return parts, num_leaving == self._group.size
