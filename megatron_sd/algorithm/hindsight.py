"""Hindsight blocks: what the teacher sees and the student does not (SD-Search, METHOD section 1).

A block is plain text that lists, attempt by attempt, the search queries of the rollouts of one question with the attempt's
outcome. Thoughts, passages and answers are left out: they would leak the answer. Each variant is one small function
`(BlockContext) -> str`; the empty string means that the rollout is not distilled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sd.records import Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One rollout as a block shows it. correct is None where the block shows no label."""

    queries: tuple[str, ...]
    correct: bool | None


Renderer = Callable[[Sequence[Attempt]], str]


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What a block may look at: the focal rollout's group, all groups of the step, a seed for what is drawn, its text form."""

    groups: Sequence[RolloutGroup]
    group: int
    focal: int  # index of the focal rollout within its group
    correct_above: float  # rho: CORRECT means answer F1 > rho
    seed: int
    render: Renderer

    @property
    def rng(self) -> random.Random:
        """A generator of its own for every (seed, group); rollouts of a group share what it draws."""
        return random.Random(f"{self.seed}/{self.group}")


BlockBuilder = Callable[[BlockContext], str]


def render_outcome_last(attempts: Sequence[Attempt]) -> str:
    """The block's text, an attempt a line; empty when no attempt searched.

    >>> print(render_outcome_last([Attempt(queries=("a", "b"), correct=True), Attempt(queries=("c",), correct=False)]), end="")
    Previous attempts at this question:
    Attempt 1: "a" -> "b" => CORRECT
    Attempt 2: "c" => INCORRECT
    """
    return _render(attempts, "Attempt {number}: {path}", "Attempt {number}: {path} => {outcome}")


def render_outcome_first(attempts: Sequence[Attempt]) -> str:
    """The same with the outcome before the queries: a causal model then knows it at every token of those queries.

    >>> print(render_outcome_first([Attempt(queries=("a", "b"), correct=True), Attempt(queries=("c",), correct=False)]), end="")
    Previous attempts at this question:
    Attempt 1 (CORRECT): "a" -> "b"
    Attempt 2 (INCORRECT): "c"
    """
    return _render(attempts, "Attempt {number}: {path}", "Attempt {number} ({outcome}): {path}")


def _render(attempts: Sequence[Attempt], without_outcome: str, with_outcome: str) -> str:
    if not any(attempt.queries for attempt in attempts):
        return ""
    lines = ["Previous attempts at this question:"]
    for number, attempt in enumerate(attempts, start=1):
        line = without_outcome if attempt.correct is None else with_outcome
        path = " -> ".join(_quoted(query) for query in attempt.queries) or "no search"
        lines.append(line.format(number=number, path=path, outcome="CORRECT" if attempt.correct else "INCORRECT"))
    return "\n".join(lines) + "\n"


def _quoted(query: str) -> str:
    """In double quotes and on one line, whatever the query holds: `x" => CORRECT` must not forge an outcome."""
    return '"' + " ".join(query.replace('"', "'").split()) + '"'


RENDERERS: dict[str, Renderer] = {"outcome_last": render_outcome_last, "outcome_first": render_outcome_first}


def is_correct(rollout: Rollout, correct_above: float) -> bool:
    """CORRECT: token F1 with any gold answer above rho (paper: rho = 0). Needs a scored rollout."""
    return rollout.scores.f1 > correct_above


def attempts_of(group: RolloutGroup, correct_above: float) -> list[Attempt]:
    """Every usable rollout of the group with its label, in index order."""
    return [Attempt(queries=r.queries, correct=is_correct(r, correct_above)) for r in group.usable]


def paper_block(context: BlockContext) -> str:
    """Queries and outcome of every rollout of the question, the focal one included."""
    return context.render(attempts_of(context.groups[context.group], context.correct_above))


def only_correct_block(context: BlockContext) -> str:
    """The CORRECT attempts alone; empty when there is none."""
    return context.render([a for a in attempts_of(context.groups[context.group], context.correct_above) if a.correct])


def no_labels_block(context: BlockContext) -> str:
    """The paper's block without outcome labels."""
    attempts = attempts_of(context.groups[context.group], context.correct_above)
    return context.render([Attempt(queries=a.queries, correct=None) for a in attempts])


def shuffled_block(context: BlockContext) -> str:
    """The paper's block with its labels permuted among the attempts: a control."""
    attempts = attempts_of(context.groups[context.group], context.correct_above)
    labels = [a.correct for a in attempts]
    context.rng.shuffle(labels)
    return context.render([Attempt(queries=a.queries, correct=c) for a, c in zip(attempts, labels, strict=True)])


def wrong_question_block(context: BlockContext) -> str:
    """The block of another question of the step: a control. Empty when the step has one question only."""
    others = [i for i in range(len(context.groups)) if i != context.group]
    if not others:
        return ""
    return context.render(attempts_of(context.groups[context.rng.choice(others)], context.correct_above))


def no_block(_: BlockContext) -> str:
    """No hindsight: plain GRPO."""
    return ""


BLOCKS: dict[str, BlockBuilder] = {
    "paper": paper_block,
    "only_correct": only_correct_block,
    "no_labels": no_labels_block,
    "shuffled": shuffled_block,
    "wrong_question": wrong_question_block,
    "none": no_block,
}


@dataclass(frozen=True, kw_only=True)
class HindsightBlocks:
    """Builds the block of every rollout of a step; before `first_step` (alpha's warm-up) there is none, so no teacher runs."""

    first_step: int
    build: BlockBuilder
    render: Renderer
    correct_above: float
    seed: int

    def __call__(self, groups: Sequence[RolloutGroup], step: int) -> list[list[str]]:
        """One text for each rollout of each group; empty where the rollout is not distilled."""
        if step < self.first_step:
            return [[""] * len(group.rollouts) for group in groups]
        shared = {"correct_above": self.correct_above, "seed": _mix(self.seed, step), "render": self.render}
        return [
            [self.build(BlockContext(groups=groups, group=g, focal=i, **shared)) for i in range(len(groups[g].rollouts))]
            for g in range(len(groups))
        ]


def _mix(seed: int, step: int) -> int:
    return seed * 1_000_003 + step
