"""From rollout records to arrays: what the update sees of a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, TurnAdvantages
from megatron_sd.algorithm.advantages.table import any_advantage
from megatron_sd.algorithm.hindsight import is_correct
from megatron_sd.algorithm.packing.outlines import Outline, PromptNumbers, Samples
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
GroupPrompts = Sequence[tuple[TokenIds | None, ...]]
TeacherPrompts = Sequence[GroupPrompts]
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


def last_query_tokens(rollout: Rollout) -> list[tuple[int, int]]:
    """Those of the last turn that searched alone, as IGSD has it (arXiv 2609.32694)."""
    spans = query_tokens(rollout)
    last = max(
        (number for number, turn in enumerate(rollout.turns) if turn.query_span is not None), default=-1
    )
    return [span if number == last else (0, 0) for number, span in enumerate(spans)]


def all_tokens(rollout: Rollout) -> list[tuple[int, int]]:
    """Every token that the policy sampled: thoughts, tags, queries and answers."""
    return [(0, len(turn.completion_ids)) for turn in rollout.turns]


SCOPES: dict[str, Scope] = {
    "query": query_tokens,
    "all": all_tokens,
    "first_query": first_query_tokens,
    "last_query": last_query_tokens,
}


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
) -> Samples:
    """One sample per rollout that is data, in group and index order; each is made when it is asked for.

    advantages: per group, per rollout, per turn. teacher_prompts: per group, per rollout. scope: which tokens
    are distilled. has_gradient: of a group's advantages (advantages/table.py). Infrastructure failures and
    rollouts without a sampled token are left out. Raises BarrenStepError when none of the usable rollouts has
    a token. Making a sample raises RolloutError for a rollout whose records do not fit together.
    """
    sources = [
        _Source(number, rollout, own, _by_prompt(prompts, rollout, scope))
        for number, group in enumerate(groups)
        for rollout, own, prompts in zip(
            group.rollouts, advantages[number], teacher_prompts[number], strict=True
        )
        if not rollout.stop_reason.is_infrastructure and any(turn.completion_ids for turn in rollout.turns)
    ]
    reasons = Counter(rollout.stop_reason.value for group in groups for rollout in group.usable)
    if reasons and not sources:
        raise BarrenStepError(
            f"none of the step's {reasons.total()} rollouts has a sampled token ({dict(reasons)}), expected"
            " some to train on"
        )
    spreads = [has_gradient(own) for own in advantages]
    return Samples(
        outlines=_outlines(sources),
        make=lambda number: _sample(sources[number], has_spread=spreads[sources[number].group]),
    )


class _Distilled(NamedTuple):
    """query_positions, teacher_prompt_ids and later_prompts of a sample (records.TrainingSample)."""

    positions: np.ndarray
    prompt: TokenIds | None
    later: tuple[tuple[int, TokenIds], ...]


class _Source(NamedTuple):
    """What a sample is made of. group: the number of its question in the step."""

    group: int
    rollout: Rollout
    advantages: TurnAdvantages
    distilled: _Distilled


def _sample(source: _Source, *, has_spread: bool) -> TrainingSample:
    rollout, distilled = source.rollout, source.distilled
    ids, mask, logprobs = rollout_arrays(rollout)
    counts = [len(turn.completion_ids) for turn in rollout.turns]
    advantages, turns = np.zeros(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.int64)
    advantages[mask] = np.repeat(np.array(source.advantages, dtype=np.float32), counts)
    turns[mask] = np.repeat(np.arange(len(counts)), counts)
    return TrainingSample(
        ids=ids,
        prompt_length=len(rollout.prompt_ids),
        loss_mask=mask,
        rollout_logprobs=logprobs,
        query_positions=distilled.positions,
        advantages=advantages,
        turns=turns,
        group=source.group,
        group_has_spread=has_spread,
        teacher_prompt_ids=distilled.prompt,
        later_prompts=distilled.later,
    )


def _outlines(sources: Sequence[_Source]) -> list[Outline]:
    """What packing would count of the samples, which are not made for it."""
    students, teachers = PromptNumbers(), PromptNumbers()
    outlines = []
    for source in sources:
        rollout, (positions, first, later) = source.rollout, source.distilled
        views: tuple[tuple[int, int, int], ...] = ()
        if first is not None and len(positions):
            ends = [*(start for start, _ in later), len(positions)]
            prompts = [first, *(prompt for _, prompt in later)]
            # A continuation begins with its prompt's last token, and ends before the last query token that
            # it scores.
            views = tuple(
                (int(positions[end - 1]) - len(rollout.prompt_ids) + 1, len(prompt), teachers(prompt))
                for end, prompt in zip(ends, prompts, strict=True)
            )
        outlines.append(
            Outline(
                student=rollout.num_tokens,
                prompt=len(rollout.prompt_ids),
                prompt_number=students(rollout.prompt_ids),
                views=views,
                num_sampled=sum(len(turn.completion_ids) for turn in rollout.turns),
                num_queries=len(positions) if views else 0,
                group=source.group,
            )
        )
    return outlines


def _by_prompt(prompts: tuple[TokenIds | None, ...], rollout: Rollout, scope: Scope) -> _Distilled:
    """prompts: none, one for all turns, or one a turn."""
    positions, turns = scoped_positions(rollout, scope)
    if len(prompts) < 2:
        return _Distilled(positions, prompts[0] if prompts else None, ())
    # A turn without a prompt is not distilled. Neighbouring queries under one prompt share a view of the
    # teacher, so only the places where the prompt changes are kept.
    kept = np.array([prompts[turn] is not None for turn in turns], dtype=bool)
    read = [prompts[turn] for turn in turns[kept]]
    changes = [n for n, prompt in enumerate(read) if n == 0 or prompt != read[n - 1]]
    if not changes:
        return _Distilled(positions, None, ())
    return _Distilled(positions[kept], read[0], tuple((n, read[n]) for n in changes[1:]))


def scoped_positions(rollout: Rollout, scope: Scope) -> tuple[np.ndarray, np.ndarray]:
    """[Q] int64 positions in the rollout's ids of the tokens that are distilled, increasing, and [Q] int64
    their turns."""
    spans = []
    offset = len(rollout.prompt_ids)
    for turn, (start, stop) in zip(rollout.turns, scope(rollout), strict=True):
        spans.append(np.arange(offset + start, offset + stop))
        offset += len(turn.completion_ids) + len(turn.observation_ids)
    positions = np.concatenate([np.zeros(0, np.int64), *spans])
    return positions, np.repeat(np.arange(len(spans)), [len(span) for span in spans])


def rollout_arrays(rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [L] int64, loss_mask [L] bool, rollout_logprobs [L] float32 of one rollout.

    Raises RolloutError when the prompt is empty (the first token would have no logits) or a query span lies
    outside its turn.
    """
    if not rollout.prompt_ids:
        raise RolloutError(
            f"rollout {rollout.index} of question {rollout.question_id} has an empty prompt, expected a token"
        )
    num_prompt = len(rollout.prompt_ids)
    ids, mask, logprobs = (
        [np.asarray(rollout.prompt_ids)],
        [np.zeros(num_prompt, bool)],
        [np.zeros(num_prompt)],
    )
    for number, turn in enumerate(rollout.turns):
        num_sampled, num_observed = len(turn.completion_ids), len(turn.observation_ids)
        start, stop = turn.query_span or (0, 0)
        if len(turn.completion_logprobs) != num_sampled or not 0 <= start <= stop <= num_sampled:
            raise RolloutError(
                f"turn {number} of rollout {rollout.index} of question {rollout.question_id} has"
                f" {num_sampled} sampled ids, {len(turn.completion_logprobs)} log-probabilities and query"
                f" span {turn.query_span}: they do not fit together"
            )
        ids += [np.asarray(turn.completion_ids), np.asarray(turn.observation_ids)]
        mask.append(np.arange(num_sampled + num_observed) < num_sampled)
        logprobs += [np.asarray(turn.completion_logprobs), np.zeros(num_observed)]
    return (
        np.concatenate(ids).astype(np.int64),
        np.concatenate(mask),
        np.concatenate(logprobs).astype(np.float32),
    )
