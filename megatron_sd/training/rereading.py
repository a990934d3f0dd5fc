"""The reading of a step's batches before its first update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_sd.algorithm.refinements import Read, Refinement
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.records import Batch
from megatron_sd.training.critic.critic import Critic
from megatron_sd.training.policy import Policy


def reread(
    batches: Sequence[Batch],
    policy: Policy,
    *,
    refinements: Sequence[Refinement] = (),
    with_teacher: bool = False,
    critic: Critic | None = None,
    epochs: int = 1,
) -> Sequence[Batch]:
    """The step's batches in the order in which they are learnt from, `epochs` times, with what the
    refinements make of them, one after the other. Nothing is read without any. with_teacher: its
    log-probabilities are asked for, too. critic: what it says, too. Collective."""
    if not refinements:
        return list(batches) * epochs
    microbatches = [microbatch for batch in batches for microbatch in batch]
    readings = [
        policy.read(microbatch, batch.totals, with_teacher=with_teacher)
        for batch in batches
        for microbatch in batch
    ]
    if critic is not None:
        readings = [
            reading._replace(**critic.read(microbatch))
            for microbatch, reading in zip(microbatches, readings, strict=True)
        ]
    for refinement in refinements:
        reads = [Read(*pair) for pair in zip(microbatches, readings, strict=True)]
        microbatches = refinement(reads, lambda own: gather_objects(policy.world, own))
    if critic is not None:
        critic.compare(microbatches)
    rest = iter(microbatches)
    refined = [
        replace(batch, microbatches=tuple(next(rest) for _ in batch.microbatches)) for batch in batches
    ]
    return [replace(batch, is_first=number == 0) for number, batch in enumerate(refined * epochs)]
