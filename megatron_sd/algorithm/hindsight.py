"""Hindsight blocks: what the teacher sees and the student does not (docs/method.md, section 1).

A block is plain text that lists, attempt by attempt, the search queries of the rollouts of one question
with the attempt's outcome. Thoughts, passages and answers are left out: they would leak the answer. Each
variant (blocks.py) is one small function `(BlockContext) -> str`; the empty string means that the rollout
is not distilled, but where the block is to have no text (`plain`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sd.records import Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class AttemptLine:
    """One rollout as a block shows it. correct is None where the block shows no label; passages: those that
    each query found, where the block shows them."""

    queries: tuple[str, ...]
    correct: bool | None
    passages: tuple[tuple[str, ...], ...] = ()


HEADLINE = "Previous attempts at this question:"

Renderer = Callable[[Sequence[AttemptLine]], str]


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What a block may look at: the focal rollout's group, all groups of the step, a seed for what is
    drawn, its text form."""

    groups: Sequence[RolloutGroup]
    group: int
    focal: int  # index of the focal rollout within its group
    correct_above: float  # rho: CORRECT means answer F1 > rho
    seed: int
    render: Renderer
    turn: int = 0  # of the focal rollout, for blocks that differ from turn to turn

    @property
    def attempts(self) -> list[AttemptLine]:
        """Every usable rollout of the group, in index order."""
        return attempts_of(self.groups[self.group], self.correct_above)

    @property
    def own(self) -> Rollout:
        """The focal rollout."""
        return self.groups[self.group].rollouts[self.focal]

    @property
    def siblings(self) -> list[Rollout]:
        """The other usable rollouts of the group, in index order."""
        return [rollout for rollout in self.groups[self.group].usable if rollout is not self.own]

    @property
    def rng(self) -> random.Random:
        """A generator of its own for every (seed, group); rollouts of a group share what it draws."""
        return random.Random(f"{self.seed}/{self.group}")


BlockBuilder = Callable[[BlockContext], str]


def render_outcome_last(attempts: Sequence[AttemptLine]) -> str:
    """The block's text, an attempt a line; empty when no attempt searched.

    >>> lines = [AttemptLine(queries=("a", "b"), correct=True), AttemptLine(queries=("c",), correct=False)]
    >>> print(render_outcome_last(lines), end="")
    Previous attempts at this question:
    Attempt 1: "a" -> "b" => CORRECT
    Attempt 2: "c" => INCORRECT
    """
    return _render(attempts, "Attempt {number}: {path}", "Attempt {number}: {path} => {outcome}")


def render_outcome_first(attempts: Sequence[AttemptLine]) -> str:
    """The same with the outcome before the queries: a causal model then knows it at every token of those
    queries.

    >>> lines = [AttemptLine(queries=("a", "b"), correct=True), AttemptLine(queries=("c",), correct=False)]
    >>> print(render_outcome_first(lines), end="")
    Previous attempts at this question:
    Attempt 1 (CORRECT): "a" -> "b"
    Attempt 2 (INCORRECT): "c"
    """
    return _render(attempts, "Attempt {number}: {path}", "Attempt {number} ({outcome}): {path}")


def _render(attempts: Sequence[AttemptLine], without_outcome: str, with_outcome: str) -> str:
    if not any(attempt.queries for attempt in attempts):
        return ""
    lines = [HEADLINE]
    for number, attempt in enumerate(attempts, start=1):
        line = without_outcome if attempt.correct is None else with_outcome
        found = [*attempt.passages, *[()] * len(attempt.queries)]
        steps = (" ".join([quoted(query), *map(quoted, own)]) for query, own in zip(attempt.queries, found))
        path = " -> ".join(steps) or "no search"
        lines.append(
            line.format(number=number, path=path, outcome="CORRECT" if attempt.correct else "INCORRECT")
        )
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """In double quotes and on one line, whatever the text holds: `x" => CORRECT` must not forge an
    outcome."""
    return '"' + " ".join(text.replace('"', "'").split()) + '"'


RENDERERS: dict[str, Renderer] = {"outcome_last": render_outcome_last, "outcome_first": render_outcome_first}


def is_correct(rollout: Rollout, correct_above: float) -> bool:
    """CORRECT: token F1 with any gold answer above rho (paper: rho = 0). Raises ValueError for a rollout
    that was not scored."""
    if rollout.scores is None:
        raise ValueError(
            f"rollout {rollout.index} has no scores, expected a scored one: call reward.score first"
        )
    return rollout.scores.f1 > correct_above


def attempts_of(group: RolloutGroup, correct_above: float) -> list[AttemptLine]:
    """Every usable rollout of the group with its label, in index order."""
    return [attempt_of(rollout, correct_above) for rollout in group.usable]


def attempt_of(rollout: Rollout, correct_above: float) -> AttemptLine:
    """A scored rollout with its label."""
    return AttemptLine(queries=rollout.queries, correct=is_correct(rollout, correct_above))


# By group and rollout: no text, one for all turns, or one a turn. None: that turn is not distilled; "": the
# teacher reads the student's own prompt.
GroupBlocks = Sequence[tuple[str | None, ...]]
Blocks = Sequence[GroupBlocks]


@dataclass(frozen=True, kw_only=True)
class HindsightBlocks:
    """Builds the block of every rollout of a step; before `first_step` (alpha's warm-up) there is none, so
    no teacher runs.

    by_turn: the block differs from turn to turn of a rollout, so there is one for each. plain: the block has
    no text, and is read all the same.
    """

    first_step: int
    build: BlockBuilder
    render: Renderer
    correct_above: float
    seed: int
    by_turn: bool = False
    plain: bool = False

    def __call__(
        self, groups: Sequence[RolloutGroup], step: int, numbers: Sequence[int] | None = None
    ) -> Blocks:
        """The texts of each rollout of the groups with these numbers (None: of all); none where the rollout is
        not distilled."""
        asked = range(len(groups)) if numbers is None else numbers
        if step < self.first_step:
            return [[()] * len(groups[g].rollouts) for g in asked]
        context = BlockContext(
            groups=groups,
            group=0,
            focal=0,
            correct_above=self.correct_above,
            seed=_mix(self.seed, step),
            render=self.render,
        )
        return [
            [self._texts(replace(context, group=g, focal=i)) for i in range(len(groups[g].rollouts))]
            for g in asked
        ]

    def _texts(self, context: BlockContext) -> tuple[str | None, ...]:
        turns = range(len(context.own.turns)) if self.by_turn else (0,)
        built = (self.build(replace(context, turn=turn)) for turn in turns)
        texts = tuple(text if text or self.plain else None for text in built)
        return () if all(text is None for text in texts) else texts


def shown(blocks: Blocks) -> list[list[str]]:
    """For metrics and for people: one text a rollout, those of its turns one after another."""
    return [["".join(text or "" for text in texts) for texts in own] for own in blocks]


def _mix(seed: int, step: int) -> int:
    return seed * 1_000_003 + step
