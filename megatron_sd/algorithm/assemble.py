"""From a step's groups and blocks to this rank's batch: what of it is a choice of the configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.advantages.table import any_advantage
from megatron_sd.algorithm.distill_aggregation import DISTILL_AGGREGATIONS
from megatron_sd.algorithm.hindsight import Blocks
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.algorithm.samples import Gate, GateContext, TeacherPrompts, apply_gate
from megatron_sd.config import DistillConfig, UpdateConfig
from megatron_sd.records import Batch, Layout, RolloutGroup, TokenIds, TrainingSample


def teacher_prompts(
    groups: Sequence[RolloutGroup],
    blocks: Blocks,
    advantages: Sequence[GroupAdvantages],
    *,
    prompt_ids: Callable[[str, str], TokenIds],
    config: DistillConfig,
    gate: Gate,
    has_gradient: Callable[[GroupAdvantages], bool] = any_advantage,
) -> TeacherPrompts:
    """The teacher's prompts of every rollout; none where there is no block or the gate is closed.

    gate: which groups distil (samples.GATES). prompt_ids: of a question and the hindsight block in front of
    it (search.Environment.prompt_ids).
    has_gradient: of a group's advantages (advantages/table.py).
    """
    encode = functools.lru_cache(maxsize=None)(prompt_ids)  # rollouts of a group share their block
    prompts = [
        [
            tuple(None if text is None else encode(group.question.text, text) for text in texts)
            for texts in own
        ]
        for group, own in zip(groups, blocks, strict=True)
    ]
    contexts = [
        GateContext(group=group, has_gradient=has_gradient(own), correct_above=config.correct_above)
        for group, own in zip(groups, advantages, strict=True)
    ]
    return apply_gate(contexts, prompts, gate)


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
    as many questions.

    aggregation, most_tokens: see microbatches.row_weight. distill_aggregation: of distill. layout: of sequences.
    place: the rank's number
    among those that read other microbatches, and how many they are (distributed.Parallel.batch)."""
    parts: list[list[TrainingSample]] = [[] for _ in range(config.minibatches)]
    num_groups = max((sample.group for sample in samples), default=0) + 1
    for sample in samples:
        parts[sample.group * config.minibatches // num_groups].append(sample)
    number, num_batches = place
    packed = [
        pack(
            part,
            max_tokens=config.max_microbatch_tokens,
            world_size=num_batches,
            aggregation=aggregation,
            most_tokens=most_tokens,
            layout=layout,
        )
        for part in parts
    ]
    return [DISTILL_AGGREGATIONS[distill_aggregation](batches)[number] for batches in packed]
