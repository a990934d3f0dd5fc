"""From rollout records to arrays: what the update sees of a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from megatron_sd.algorithm.advantage import has_spread
from megatron_sd.algorithm.hindsight import is_correct
from megatron_sd.errors import RolloutError
from megatron_sd.records import Rollout, RolloutGroup, TokenIds, TrainingSample

Gate = Callable[[RolloutGroup, float], bool]
TeacherPrompts = Sequence[Sequence[TokenIds | None]]  # per group, per rollout in index order; None: not distilled


def every_group(_group: RolloutGroup, _correct_above: float) -> bool:
    """No gate."""
    return True


def groups_with_correct(group: RolloutGroup, correct_above: float) -> bool:
    """Groups in which at least one attempt is CORRECT."""
    return any(is_correct(rollout, correct_above) for rollout in group.usable)


def mixed_groups(group: RolloutGroup, correct_above: float) -> bool:
    """Groups with CORRECT and INCORRECT attempts."""
    return len({is_correct(rollout, correct_above) for rollout in group.usable}) == 2


GATES: dict[str, Gate] = {"none": every_group, "has_correct": groups_with_correct, "mixed": mixed_groups}


def apply_gate(
    groups: Sequence[RolloutGroup], teacher_prompts: TeacherPrompts, gate: Gate, correct_above: float
) -> TeacherPrompts:
    """The teacher prompts with those of groups that the gate closes replaced by None."""
    return [
        prompts if gate(group, correct_above) else [None] * len(prompts)
        for group, prompts in zip(groups, teacher_prompts, strict=True)
    ]


def to_samples(
    groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[float]], teacher_prompts: TeacherPrompts
) -> list[TrainingSample]:
    """One sample per rollout that is data, in group and index order.

    advantages and teacher_prompts: per group, per rollout. Infrastructure failures and rollouts without a sampled token are left
    out. Raises RolloutError for a rollout whose records do not fit together, and when none of the usable rollouts has a token.
    """
    samples = []
    for number, group in enumerate(groups):
        spread = has_spread(group)
        for rollout, advantage, teacher_prompt in zip(group.rollouts, advantages[number], teacher_prompts[number], strict=True):
            if rollout.stop_reason.is_infrastructure or not any(turn.completion_ids for turn in rollout.turns):
                continue
            ids, mask, logprobs, query_positions = rollout_arrays(rollout)
            samples.append(
                TrainingSample(
                    ids=ids,
                    prompt_length=len(rollout.prompt_ids),
                    loss_mask=mask,
                    rollout_logprobs=logprobs,
                    query_positions=query_positions,
                    advantage=advantage,
                    group=number,
                    group_has_spread=spread,
                    teacher_prompt_ids=teacher_prompt,
                )
            )
    reasons = Counter(rollout.stop_reason.value for group in groups for rollout in group.usable)
    if reasons and not samples:
        raise RolloutError(
            f"none of the step's {reasons.total()} rollouts has a sampled token ({dict(reasons)}), expected some to train on: "
            "raise rollout.max_rollout_tokens above the length of the prompts"
        )
    return samples


def rollout_arrays(rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids [L] int64, loss_mask [L] bool, rollout_logprobs [L] float32, query_positions [Q] int64 of one rollout.

    Raises RolloutError when the prompt is empty (the first token would have no logits) or a query span lies outside its turn.
    """
    if not rollout.prompt_ids:
        raise RolloutError(f"rollout {rollout.index} of question {rollout.question_id} has an empty prompt, expected a token")
    ids: list[int] = list(rollout.prompt_ids)
    mask: list[bool] = [False] * len(ids)
    logprobs: list[float] = [0.0] * len(ids)
    query_positions: list[int] = []
    for number, turn in enumerate(rollout.turns):
        num_sampled, num_observed = len(turn.completion_ids), len(turn.observation_ids)
        start, stop = turn.query_span or (0, 0)
        if len(turn.completion_logprobs) != num_sampled or not 0 <= start <= stop <= num_sampled:
            raise RolloutError(
                f"turn {number} of rollout {rollout.index} of question {rollout.question_id} has {num_sampled} sampled ids, "
                f"{len(turn.completion_logprobs)} log-probabilities and query span {turn.query_span}: they do not fit together"
            )
        query_positions.extend(range(len(ids) + start, len(ids) + stop))
        ids.extend(turn.completion_ids + turn.observation_ids)
        mask.extend([True] * num_sampled + [False] * num_observed)
        logprobs.extend(turn.completion_logprobs + (0.0,) * num_observed)
    return (
        np.array(ids, dtype=np.int64),
        np.array(mask, dtype=bool),
        np.array(logprobs, dtype=np.float32),
        np.array(query_positions, dtype=np.int64),
    )
