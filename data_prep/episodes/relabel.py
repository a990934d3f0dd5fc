"""How often a wrong answer is the right one to another question whose passages the rollout had found: what
hindsight relabelling (Andrychowicz et al., 2017, arXiv 1707.01495) could use of failures.

    python -m data_prep.episodes.relabel runs/real/sample/rollouts.jsonl --questions data/questions.jsonl

It measures and changes nothing. A relabelled rollout is no data for a policy gradient: its prompt was
another one, and its thoughts may quote the old question (`num_clean` leaves these out).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sd.records import Question, Rollout, RolloutGroup
from megatron_sd.rollout.stored import StoredGroups
from megatron_sd.search.questions import load_questions
from megatron_sd.search.rewards.answers import normalize_strict

_WORDS = re.compile(r"\w{4,}")  # shorter ones are in every question


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """num_wrong: usable rollouts that answered, not right. num_matching: of these, answers that another
    question has as a gold answer, while a passage that supports it was found. num_clean: of these, rollouts
    whose queries hold no content word of the old question that the new one lacks."""

    num_wrong: int
    num_matching: int
    num_clean: int

    def line(self) -> str:
        """For people."""
        share, clean = (number / max(self.num_wrong, 1) for number in (self.num_matching, self.num_clean))
        return (
            f"{self.num_wrong} wrong answers; {self.num_matching} ({share:.2%}) answer another question whose"
            f" passage was found, {self.num_clean} ({clean:.2%}) without words of the old question in a query"
        )


def measure(groups: Iterable[RolloutGroup], questions: Sequence[Question]) -> Relabelling:
    """Over all rollouts of the groups. questions: those that could be asked instead."""
    by_answer: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        for gold in question.golden_answers:
            if normalized := normalize_strict(gold):
                by_answer[normalized].append(question)
    wrong = [
        (group.question, rollout)
        for group in groups
        for rollout in group.usable
        if rollout.answer is not None and not _is_right(rollout.answer, group.question)
    ]
    found = [(asked, rollout, others(asked, rollout, by_answer)) for asked, rollout in wrong]
    return Relabelling(
        num_wrong=len(wrong),
        num_matching=sum(bool(matching) for *_, matching in found),
        num_clean=sum(any(_is_clean(asked, r, new) for new in matching) for asked, r, matching in found),
    )


def others(asked: Question, rollout: Rollout, by_answer: Mapping[str, Sequence[Question]]) -> list[Question]:
    """Questions other than the one asked that the rollout's answer is right for, and of which it found a
    supporting passage."""
    hits = {hit.passage.id for turn in rollout.turns for hit in turn.hits}
    return [
        question
        for question in by_answer.get(normalize_strict(rollout.answer or ""), ())
        if question.id != asked.id and any(not hits.isdisjoint(hop) for hop in question.supporting)
    ]


def _is_right(answer: str, question: Question) -> bool:
    return normalize_strict(answer) in {normalize_strict(gold) for gold in question.golden_answers}


def _is_clean(asked: Question, rollout: Rollout, new: Question) -> bool:
    old = set(_WORDS.findall(asked.text.lower())) - set(_WORDS.findall(new.text.lower()))
    return old.isdisjoint(_WORDS.findall(" ".join(rollout.queries).lower()))


def main() -> None:
    """Measure and say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts", type=Path, help="rollouts.jsonl of `sd-search sample`")
    parser.add_argument("--questions", type=Path, required=True, help="those that could be asked instead")
    arguments = parser.parse_args()
    print(measure(StoredGroups(arguments.rollouts), load_questions(str(arguments.questions))).line())


if __name__ == "__main__":
    main()
