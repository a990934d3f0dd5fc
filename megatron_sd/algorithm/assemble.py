"""From a step's groups and blocks to this rank's batch: what of it is a choice of the configuration.

Every rank holds the groups of all, which are light, and the work on them is shared out: blocks and prompts are
made of some groups on each rank, arrays of the rollouts that a rank will read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.advantages.table import any_advantage
from megatron_sd.algorithm.distill_aggregation import DISTILL_AGGREGATIONS
from megatron_sd.algorithm.hindsight import HindsightBlocks, shown
from megatron_sd.algorithm.packing.batches import own_batch
from megatron_sd.algorithm.packing.outlines import Samples
from megatron_sd.algorithm.samples import Gate, GateContext, GroupPrompts, apply_gate
from megatron_sd.compact import compact_ids
from megatron_sd.config import UpdateConfig
from megatron_sd.records import Batch, Layout, RolloutGroup, TokenIds, TrainingSample


class Teaching(NamedTuple):
    """What the teacher is shown of a group. texts: each rollout's blocks, as metrics and people see them.
    prompts: what the teacher reads in front of each rollout (samples.GroupPrompts)."""

    texts: Sequence[str]
    prompts: GroupPrompts


def teach(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[GroupAdvantages],
    step: int,
    numbers: Sequence[int],
    *,
    hindsight: HindsightBlocks,
    prompt_ids: Callable[[str, str], TokenIds],
    gate: Gate,
    has_gradient: Callable[[GroupAdvantages], bool] = any_advantage,
) -> list[Teaching]:
    """What the teacher is shown of the groups with these numbers, in their order; no prompts where there is no
    block or the gate is closed. Ranks call it with some numbers each: blocks may look at all groups.

    gate: which groups distil (samples.GATES). prompt_ids: of a question and the hindsight block in front of
    it (search.Environment.prompt_ids). has_gradient: of a group's advantages (advantages/table.py).
    """

    @functools.cache  # rollouts of a group share their block
    def encode(question: str, text: str) -> TokenIds:
        return compact_ids(prompt_ids(question, text))

    blocks = hindsight(groups, step, numbers)
    own = [groups[number] for number in numbers]
    prompts = [
        [
            tuple(None if text is None else encode(group.question.text, text) for text in texts)
            for texts in of_group
        ]
        for group, of_group in zip(own, blocks, strict=True)
    ]
    contexts = [
        GateContext(
            group=groups[number],
            has_gradient=has_gradient(advantages[number]),
            correct_above=hindsight.correct_above,
        )
        for number in numbers
    ]
    return list(map(Teaching, shown(blocks), apply_gate(contexts, prompts, gate)))


def teach_nothing(
    groups: Sequence[RolloutGroup], _: Sequence[GroupAdvantages], __: int, numbers: Sequence[int]
) -> list[Teaching]:
    """Nobody is distilled."""
    sizes = [len(groups[number].rollouts) for number in numbers]
    return [Teaching([""] * size, [()] * size) for size in sizes]


def own_batches(
    samples: Sequence[TrainingSample],
    *,
    config: UpdateConfig,
    aggregation: str,
    most_tokens: int = 1,
    distill_aggregation: str = "rollout",
    layout: Layout = "padded",
    place: tuple[int, int],
) -> list[Batch]:
    """This rank's part of each optimiser step: the questions in order, cut into config.minibatches parts of
    as many questions. samples: of all ranks; this one looks at no others than those that it reads.

    aggregation, most_tokens: see microbatches.row_weight. distill_aggregation: of distill. layout: of
    sequences. place: the rank's number among those that read other microbatches, and how many they are
    (distributed.Parallel.batch)."""
    step = Samples.of(samples)
    groups = [outline.group for outline in step.outlines]
    num_groups = max(groups, default=0) + 1
    parts: list[list[int]] = [[] for _ in range(config.minibatches)]
    for number, group in enumerate(groups):
        parts[group * config.minibatches // num_groups].append(number)
    batches = []
    for part in map(step.part, parts):
        batch = own_batch(
            part,
            place=place,
            max_tokens=config.microbatch_tokens,
            aggregation=aggregation,
            most_tokens=most_tokens,
            layout=layout,
        )
        num_queries = sum(outline.num_queries for outline in part.outlines)
        batches.append(DISTILL_AGGREGATIONS[distill_aggregation](batch, num_queries))
    return batches
