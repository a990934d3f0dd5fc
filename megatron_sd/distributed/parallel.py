"""How the ranks share the work of an update: one record, made once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_sd.config import UpdateConfig
from megatron_sd.distributed.groups import RankGroup, neighbours
from megatron_sd.distributed.world import World


class Place(NamedTuple):
    """The `rank`-th of `size`."""

    rank: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's part of an update.

    world: all ranks. sequence: the ranks that read the same microbatch as this one, each a slice of every
    sequence (training/parallel/sequence.py). tensor: those that read the same microbatch, each with its
    part of every layer (training/parallel/tensor.py). A rank that shares nothing is alone in both.
    """

    world: World
    sequence: RankGroup
    tensor: RankGroup

    @classmethod
    def of(cls, update: UpdateConfig, world: World) -> Parallel:
        """The groups that the configuration asks for. Collective at the first call. Raises ConfigError when
        the ranks do not divide into such groups."""
        return cls(
            world=world,
            sequence=neighbours(world, update.sequence_parallel_size, "update.sequence_parallel_size"),
            tensor=neighbours(world, update.tensor_parallel_size, "update.tensor_parallel_size"),
        )

    @property
    def batch(self) -> Place:
        """Among those that read other microbatches."""
        sharers = self.sequence.size * self.tensor.size
        return Place(self.world.rank // sharers, self.world.size // sharers)

    @property
    def zero(self) -> Place:
        """Among those that ZeRO shards the same parameters over."""
        return Place(self.world.rank // self.tensor.size, self.world.size // self.tensor.size)
