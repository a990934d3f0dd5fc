"""Which evaluation questions were training questions: a score on those says what was learnt by heart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.summary import set_name
from megatron_sd.records import Question
from megatron_sd.search.rewards.answers import normalize_strict


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """num_shared of the evaluation's questions are training questions too. by_set: how many of each set;
    ids: which."""

    num_training_questions: int
    num_shared: int
    by_set: Mapping[str, int]
    ids: tuple[str, ...]


def measure_overlap(questions: Sequence[Question], training: Sequence[Question]) -> Overlap:
    """Questions are the same when their texts are, case, punctuation, articles and white space left out
    (the strict normalisation)."""
    known = {normalize_strict(question.text) for question in training}
    shared = [question for question in questions if normalize_strict(question.text) in known]
    counts = Counter(set_name(question.source) for question in shared)
    return Overlap(
        num_training_questions=len(training),
        num_shared=len(shared),
        by_set=dict(sorted(counts.items())),
        ids=tuple(sorted(question.id for question in shared)),
    )
