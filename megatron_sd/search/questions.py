"""Questions from a jsonl file, and the order in which training meets them."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from megatron_sd.errors import DataError
from megatron_sd.records import Question
from megatron_sd.search.reward import empty_answers

Item = TypeVar("Item")


def load_questions(
    path: str | Path, split: str | None = None, limit: int | None = None, needs_answers: bool = True
) -> tuple[Question, ...]:
    """Read a questions file (`sd-search data import` writes it): one JSON object a line with the fields of
    `Question`.

    split: keep records of this split only; limit: keep the first so many; needs_answers: False where only
    passages are looked for, which questions of BEIR name without an answer. Raises DataError naming file
    and line for a broken record, and for a file that holds no matching question.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"questions file {path} does not exist; write one with `sd-search data import` or `sd-search"
            " world`"
        )
    questions: list[Question] = []
    splits: set[str] = set()
    first_lines: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            question = _parse(line, f"{path}:{number}", needs_answers)
            if first_lines.setdefault(question.id, number) != number:
                raise DataError(
                    f"{path}:{number}: id {question.id!r} repeats that of line {first_lines[question.id]}"
                )
            splits.add(question.split)
            if split is None or question.split == split:
                questions.append(question)
            if limit is not None and len(questions) == limit:
                break
    if not questions:
        if not splits or split is None:
            raise DataError(f"{path} holds no question")
        raise DataError(
            f"{path} holds no question of split {split!r}, found {', '.join(map(repr, sorted(splits)))}: name a"
            f" split that is there, or import with --split {split}"
        )
    return tuple(questions)


def _parse(line: bytes, place: str, needs_answers: bool) -> Question:
    try:
        record = json.loads(line)
        if not isinstance(record["golden_answers"], list) or not all(
            isinstance(gold, str) for gold in record["golden_answers"]
        ):
            raise TypeError(f"golden_answers is {record['golden_answers']!r}")
        question = Question(
            id=str(record["id"]),
            text=record["text"],
            golden_answers=tuple(record["golden_answers"]),
            source=record.get("source", ""),
            split=record.get("split", ""),
            supporting=tuple(tuple(hop) for hop in record.get("supporting", ())),
        )
        json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate passes json.loads and no tokenizer
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place}: not a question record ({type(error).__name__}: {error}); expected a JSON object with"
            " id, text and golden_answers; convert other formats with `sd-search data import`"
        ) from error
    if (
        not isinstance(question.text, str)
        or not question.text.strip()
        or (needs_answers and not question.golden_answers)
    ):
        raise DataError(f"{place}: question {question.id} has an empty text or no golden answers")
    empty = empty_answers(question.golden_answers)
    if empty:
        raise DataError(
            f"{place}: gold answer {empty[0]!r} of question {question.id} normalises to nothing, so an empty"
            " answer would match it; `sd-search data import` sorts such answers out"
        )
    return question


@dataclass(frozen=True, kw_only=True)
class QuestionStream(Generic[Item]):
    """An endless, seeded order of questions, or of stored groups of rollouts, a fresh permutation each
    epoch; a pure function of the step: no state to save."""

    questions: Sequence[Item]
    batch_size: int
    seed: int
    shuffle: bool

    def batch(self, step: int) -> tuple[Item, ...]:
        """The questions of optimiser step `step` (0-based): [batch_size]; epochs follow one another without
        a gap."""
        start = step * self.batch_size
        return tuple(self._at(place) for place in range(start, start + self.batch_size))

    def _at(self, place: int) -> Item:
        epoch, offset = divmod(place, len(self.questions))
        return self.questions[
            _permutation(len(self.questions), self.seed, epoch)[offset] if self.shuffle else offset
        ]


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
