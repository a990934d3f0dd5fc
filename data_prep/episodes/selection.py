"""Which sampled rollouts become training episodes, and with which hindsight block in front: pure functions
on records.

An episode is a right rollout behind a prompt. Without a block it teaches to search; with the attempts of
its own group as the block it teaches to read one. A model that saw only true labels would take the word
CORRECT for a switch, so a share of the blocks has permuted labels, and a share is another question's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_sd.algorithm.blocks import BLOCKS
from megatron_sd.algorithm.hindsight import RENDERERS, BlockContext, is_correct
from megatron_sd.records import SEARCH, Action, Question, Rollout, RolloutGroup, TokenIds, Turn

Kind = Literal["plain", "linked", "shuffled", "wrong_question"]
Prompt = Callable[[str, str], TokenIds]  # question, block ("" without one) -> prompt


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept. Right means exact match; the pass rate of a question is the share of right ones among
    its usable rollouts.

    Of a question within the pass rates, the right rollouts of valid form with at least min_searches are
    kept, fewest searches first, at most per_question; the first blocks_per_question of them once more
    behind a block: the group's attempts with true labels, but for shuffled_share with permuted ones and
    wrong_question_share of another question.
    """

    min_pass_rate: float = 0.0  # of a question
    max_pass_rate: float = 1.0  # of a question
    per_question: int = 2  # right rollouts that are kept, fewest searches first
    min_searches: int = 1  # of a rollout
    needs_form: bool = True  # keep rollouts of valid form alone
    max_tokens: int = 4096  # of an episode, prompt and block included
    blocks_per_question: int = 1  # 0: no episode has a block
    shuffled_share: float = 0.15  # of the blocks, with permuted labels
    wrong_question_share: float = 0.15  # of the blocks, of another question
    block: Literal["paper", "leave_one_out"] = "paper"  # of the true labels: algorithm/blocks.py
    # as `distill.block_format` of the training that follows
    block_format: Literal["outcome_last", "outcome_first"] = "outcome_last"
    correct_above: float = 0.0  # rho of the labels
    validation_share: float = 0.1  # of the questions, with all that belongs to them


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A rollout whose prompt_ids are the episode's prompt, and what stands in that prompt."""

    question: Question
    rollout: Rollout
    kind: Kind


@dataclass(kw_only=True)
class SelectionTally:
    """What was kept, by split and kind, and which rollouts were dropped, by reason."""

    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """In one line."""
        kept = ", ".join(f"{split} {kind} {count}" for (split, kind), count in sorted(self.kept.items()))
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()) if count)
        return (
            f"kept {self.kept.total()} episodes ({kept or 'none'}); dropped {self.dropped.total()}"
            f" ({dropped or 'none'})"
        )


def is_held_out(question_id: str, share: float, seed: int) -> bool:
    """Whether a question is for validation: a draw of its own, so that other questions do not move it."""
    return random.Random(f"validation/{seed}/{question_id}").random() < share


def without_tokens(group: RolloutGroup) -> RolloutGroup:
    """What a block needs of a group: queries, scores, why it ended."""

    def bare(rollout: Rollout) -> Rollout:
        turns = (
            Turn(completion_ids=(), completion_logprobs=(), action=Action(tool=SEARCH, text=query))
            for query in rollout.queries
        )
        return replace(rollout, prompt_ids=(), turns=tuple(turns))

    return RolloutGroup(question=group.question, rollouts=tuple(map(bare, group.rollouts)))


def is_within(group: RolloutGroup, selection: Selection) -> str | None:
    """None for a question of the wanted difficulty; else why it is not."""
    usable = group.usable
    rate = sum(rollout.scores.em == 1.0 for rollout in usable) / len(usable) if usable else 0.0
    if rate < selection.min_pass_rate:
        return "too_hard"
    return "too_easy" if rate > selection.max_pass_rate else None


def select_rollouts(group: RolloutGroup, selection: Selection, tally: SelectionTally) -> list[Rollout]:
    """The rollouts of a scored group that are kept, fewest searches first; the others are counted by
    reason."""
    tally.dropped["infrastructure"] += len(group.rollouts) - len(group.usable)
    reason = is_within(group, selection)
    if reason is not None:
        tally.dropped[reason] += len(group.usable)
        return []
    kept: list[Rollout] = []
    met: set[tuple[TokenIds, ...]] = set()
    for rollout in sorted(group.usable, key=lambda r: (len(r.queries), r.num_tokens, r.index)):
        written = tuple(turn.completion_ids for turn in rollout.turns)
        reason = _why_not(rollout, selection) or ("repeat" if written in met else None)
        if reason is None and len(kept) == selection.per_question:
            reason = "surplus"
        if reason is None:
            kept.append(rollout)
            met.add(written)
        else:
            tally.dropped[reason] += 1
    return kept


def _why_not(rollout: Rollout, selection: Selection) -> str | None:
    if rollout.scores.em != 1.0:
        return "wrong"
    if selection.needs_form and rollout.scores.format_valid != 1.0:
        return "form"
    return "few_searches" if len(rollout.queries) < selection.min_searches else None


@dataclass(frozen=True, kw_only=True)
class EpisodeMaker:
    """Makes the episodes of one question after the other. bare: the groups of its split (without_tokens),
    from which blocks are built."""

    selection: Selection
    prompt: Prompt
    bare: Sequence[RolloutGroup]
    seed: int

    def __call__(self, group: RolloutGroup, place: int, tally: SelectionTally) -> list[Episode]:
        """place: of the group in `bare`. Same arguments, same episodes."""
        kept = select_rollouts(group, self.selection, tally)
        plans: list[tuple[Rollout, Kind]] = [(rollout, "plain") for rollout in kept]
        rng = random.Random(f"blocks/{self.seed}/{group.question.id}")
        plans += [(rollout, self._kind(group, rng)) for rollout in kept[: self.selection.blocks_per_question]]
        episodes = []
        for rollout, kind in plans:
            block = "" if kind == "plain" else self._block(kind, place, group.rollouts.index(rollout))
            if kind != "plain" and not block:
                tally.dropped["empty_block"] += 1
                continue
            own = replace(rollout, prompt_ids=self.prompt(group.question.text, block))
            if own.num_tokens > self.selection.max_tokens:
                tally.dropped["too_long"] += 1
                continue
            episodes.append(Episode(question=group.question, rollout=own, kind=kind))
        return episodes

    def _kind(self, group: RolloutGroup, rng: random.Random) -> Kind:
        """Labels that are all alike cannot be permuted: such a block is linked."""
        draw = rng.random()
        if draw < self.selection.wrong_question_share:
            return "wrong_question"
        is_mixed = len({is_correct(rollout, self.selection.correct_above) for rollout in group.usable}) == 2
        shuffles = draw < self.selection.wrong_question_share + self.selection.shuffled_share
        return "shuffled" if shuffles and is_mixed else "linked"

    def _block(self, kind: Kind, place: int, focal: int) -> str:
        name = self.selection.block if kind == "linked" else kind
        return BLOCKS[name](
            BlockContext(
                groups=self.bare,
                group=place,
                focal=focal,
                correct_above=self.selection.correct_above,
                seed=self.seed,
                render=RENDERERS[self.selection.block_format],
            )
        )
