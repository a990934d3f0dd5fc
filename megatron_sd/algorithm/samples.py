"""From rollout records to arrays: what the update sees of a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.advantages.table import any_advantage
from megatron_sd.algorithm.hindsight import is_correct
from megatron_sd.errors import BarrenStepError, RolloutError
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.seam import Seam, fault_of_type
from megatron_sd.records import Rollout, RolloutGroup, TokenIds, TrainingSample


@dataclass(frozen=True, kw_only=True)
class GateContext:
    """What a gate looks at. has_gradient: the policy loss has one there. correct_above: a rollout is CORRECT
    when its answer's token F1 exceeds it."""

    group: RolloutGroup
    has_gradient: bool
    correct_above: float


Gate = Callable[[GateContext], bool]  # whether the group distils
# Per group, per rollout in index order: no prompt, one for all turns, or one a turn (None: that turn is not
# distilled).
TeacherPrompts = Sequence[Sequence[tuple[TokenIds | None, ...]]]
# for each turn, [start, stop) of its completion ids that are distilled
Scope = Callable[[Rollout], list[tuple[int, int]]]


def every_group(_: GateContext) -> bool:
    """No gate."""
    return True


def groups_with_correct(context: GateContext) -> bool:
    """Groups in which at least one attempt is CORRECT."""
    return any(is_correct(rollout, context.correct_above) for rollout in context.group.usable)


def mixed_groups(context: GateContext) -> bool:
    """Groups with CORRECT and INCORRECT attempts."""
    return len({is_correct(rollout, context.correct_above) for rollout in context.group.usable}) == 2


def groups_with_spread(context: GateContext) -> bool:
    """Groups in which L_GRPO has a gradient; the others are skipped."""
    return context.has_gradient


GATES: dict[str, Gate] = {
    "none": every_group,
    "has_correct": groups_with_correct,
    "mixed": mixed_groups,
    "reward_spread": groups_with_spread,
}

GATE_SEAM = Seam(
    key="distill.gate",
    form="gate(context: GateContext) -> bool",
    table=GATES,
    example=lambda: (GateContext(group=example_groups()[0], has_gradient=True, correct_above=0.0),),
    fault=lambda is_open, *_: fault_of_type(is_open, bool),
)


def query_tokens(rollout: Rollout) -> list[tuple[int, int]]:
    """The tokens strictly between the search tags of every turn: the paper's scope."""
    return [turn.query_span or (0, 0) for turn in rollout.turns]


def first_query_tokens(rollout: Rollout) -> list[tuple[int, int]]:
    """Those of the first turn that searched alone: later queries depend on what it found."""
    spans = query_tokens(rollout)
    first = next((number for number, turn in enumerate(rollout.turns) if turn.query_span is not None), None)
    return [span if number == first else (0, 0) for number, span in enumerate(spans)]


def all_tokens(rollout: Rollout) -> list[tuple[int, int]]:
    """Every token that the policy sampled: thoughts, tags, queries and answers."""
    return [(0, len(turn.completion_ids)) for turn in rollout.turns]


SCOPES: dict[str, Scope] = {"query": query_tokens, "all": all_tokens, "first_query": first_query_tokens}


def apply_gate(
    contexts: Sequence[GateContext], teacher_prompts: TeacherPrompts, gate: Gate
) -> TeacherPrompts:
    """The teacher prompts without those of groups that the gate closes."""
    return [
        prompts if gate(context) else [()] * len(prompts)
        for context, prompts in zip(contexts, teacher_prompts, strict=True)
    ]


def to_samples(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[GroupAdvantages],
    teacher_prompts: TeacherPrompts,
    *,
    scope: Scope,
    has_gradient: Callable[[GroupAdvantages], bool] = any_advantage,
) -> list[TrainingSample]:
    """One sample per rollout that is data, in group and index order.

    advantages: per group, per rollout, per turn. teacher_prompts: per group, per rollout. scope: which tokens
    are distilled. has_gradient: of a group's advantages (advantages/table.py). Infrastructure failures and
    rollouts without a sampled token are left out. Raises RolloutError for a rollout whose records do not fit
    together, and BarrenStepError when none of the usable rollouts has a token.
    """
    samples = []
    for number, group in enumerate(groups):
        spread = has_gradient(advantages[number])
        for rollout, by_turn, prompts in zip(
            group.rollouts, advantages[number], teacher_prompts[number], strict=True
        ):
            if rollout.stop_reason.is_infrastructure or not any(
                turn.completion_ids for turn in rollout.turns
            ):
                continue
            ids, mask, logprobs = rollout_arrays(rollout)
            counts = [len(turn.completion_ids) for turn in rollout.turns]
            spread_out, turns = np.zeros(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.int64)
            spread_out[mask] = np.repeat(np.array(by_turn, dtype=np.float32), counts)
            turns[mask] = np.repeat(np.arange(len(counts)), counts)
            query_positions, query_turns = scoped_positions(rollout, scope)
            query_positions, teacher_prompt, later_prompts = _by_prompt(prompts, query_positions, query_turns)
            samples.append(
                TrainingSample(
                    ids=ids,
                    prompt_length=len(rollout.prompt_ids),
                    loss_mask=mask,
                    rollout_logprobs=logprobs,
                    query_positions=query_positions,
                    advantages=spread_out,
                    turns=turns,
                    group=number,
                    group_has_spread=spread,
                    teacher_prompt_ids=teacher_prompt,
                    later_prompts=later_prompts,
                )
            )
    reasons = Counter(rollout.stop_reason.value for group in groups for rollout in group.usable)
    if reasons and not samples:
        raise BarrenStepError(
            f"none of the step's {reasons.total()} rollouts has a sampled token ({dict(reasons)}), expected"
            " some to train on"
        )
    return samples


def _by_prompt(
    prompts: tuple[TokenIds | None, ...], positions: np.ndarray, turns: np.ndarray
) -> tuple[np.ndarray, TokenIds | None, tuple[tuple[int, TokenIds], ...]]:
    """query_positions, teacher_prompt_ids and later_prompts of a sample (records.TrainingSample)."""
    if len(prompts) < 2:
        return positions, prompts[0] if prompts else None, ()
    # A turn without a prompt is not distilled. Neighbouring queries under one prompt share a view of the
    # teacher, so only the places where the prompt changes are kept.
    kept = np.array([prompts[turn] is not None for turn in turns], dtype=bool)
    read = [prompts[turn] for turn in turns[kept]]
    changes = [n for n, prompt in enumerate(read) if n == 0 or prompt != read[n - 1]]
    if not changes:
        return positions, None, ()
    return positions[kept], read[0], tuple((n, read[n]) for n in changes[1:])


def scoped_positions(rollout: Rollout, scope: Scope) -> tuple[np.ndarray, np.ndarray]:
    """[Q] int64 positions in the rollout's ids of the tokens that are distilled, increasing, and [Q] int64
    their turns."""
    positions: list[int] = []
    turns: list[int] = []
    offset = len(rollout.prompt_ids)
    for number, (turn, (start, stop)) in enumerate(zip(rollout.turns, scope(rollout), strict=True)):
        positions.extend(range(offset + start, offset + stop))
        turns.extend([number] * (stop - start))
        offset += len(turn.completion_ids) + len(turn.observation_ids)
    return np.array(positions, dtype=np.int64), np.array(turns, dtype=np.int64)


def rollout_arrays(rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [L] int64, loss_mask [L] bool, rollout_logprobs [L] float32 of one rollout.

    Raises RolloutError when the prompt is empty (the first token would have no logits) or a query span lies
    outside its turn.
    """
    if not rollout.prompt_ids:
        raise RolloutError(
            f"rollout {rollout.index} of question {rollout.question_id} has an empty prompt, expected a token"
        )
    ids: list[int] = list(rollout.prompt_ids)
    mask: list[bool] = [False] * len(ids)
    logprobs: list[float] = [0.0] * len(ids)
    for number, turn in enumerate(rollout.turns):
        num_sampled, num_observed = len(turn.completion_ids), len(turn.observation_ids)
        start, stop = turn.query_span or (0, 0)
        if len(turn.completion_logprobs) != num_sampled or not 0 <= start <= stop <= num_sampled:
            raise RolloutError(
                f"turn {number} of rollout {rollout.index} of question {rollout.question_id} has"
                f" {num_sampled} sampled ids, {len(turn.completion_logprobs)} log-probabilities and query"
                f" span {turn.query_span}: they do not fit together"
            )
        ids.extend(turn.completion_ids + turn.observation_ids)
        mask.extend([True] * num_sampled + [False] * num_observed)
        logprobs.extend(turn.completion_logprobs + (0.0,) * num_observed)
    return (
        np.array(ids, dtype=np.int64),
        np.array(mask, dtype=bool),
        np.array(logprobs, dtype=np.float32),
    )
