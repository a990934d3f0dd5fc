"""Questions from a jsonl file, and the order in which training meets them."""

from __future__ import annotations

import functools
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from megatron_sd.config import DataConfig
from megatron_sd.errors import DataError
from megatron_sd.records import Question
from megatron_sd.search.rewards.answers import empty_answers

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


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


def training_stream(
    data: DataConfig, *, batch_size: int, seed: int
) -> QuestionStream[Question] | MixedStream[Question]:
    """The order in which training meets its questions. Raises DataError for a file that is broken, for an id
    that stands in two of the sets, and where no question of a set has a wanted pass rate."""
    sets = [load_questions(data.train, data.train_split)]
    sets += [load_questions(own.train, own.split) for own in data.mix.values()]
    paths = [data.train, *(own.train for own in data.mix.values())]
    seen: dict[str, str] = {}
    for path, questions in zip(paths, sets, strict=True):
        for question in questions:
            if seen.setdefault(question.id, path) != path:
                raise DataError(
                    f"data.mix: id {question.id!r} stands in {seen[question.id]} and in {path}, expected it once:"
                    " rollouts are known by their question's id"
                )
    if data.pass_rates is not None:
        rates = read_pass_rates(Path(data.pass_rates))
        sets = [_within(questions, rates, data, path) for path, questions in zip(paths, sets, strict=True)]
    streams = [
        QuestionStream(questions=own, batch_size=batch_size, seed=seed, shuffle=data.shuffle) for own in sets
    ]
    if len(streams) == 1:
        return streams[0]
    weights = (data.weight, *(own.weight for own in data.mix.values()))
    return MixedStream(streams=streams, weights=weights, batch_size=batch_size, seed=seed)


def check_hops(stream: QuestionStream[Question] | MixedStream[Question], needed_by: Sequence[str]) -> None:
    """Settings that compare what searches found with the passages of each hop say nothing of questions that name
    none: a warning where these are some, DataError where they are all. needed_by: such settings, of this run."""
    streams = stream.streams if isinstance(stream, MixedStream) else [stream]
    questions = [question for own in streams for question in own.questions]
    nameless = sum(not question.supporting for question in questions)
    if not needed_by or not nameless:
        return
    told = f"{nameless} of {len(questions)} training questions name no supporting passages"
    if nameless == len(questions):
        raise DataError(
            f"{' and '.join(needed_by)}: {told}, expected some that do (`supporting`; `sd-search data import"
            " --passages` finds the ids of titles), for these settings look at nothing else"
        )
    logger.warning("%s: %s does nothing for them", told, " and ".join(needed_by))


def read_pass_rates(path: Path) -> dict[str, float]:
    """question id -> share of its answers that were right (exact match), of an evaluation's samples.jsonl,
    whose last line of a question counts. Raises DataError."""
    if not path.is_file():
        raise DataError(
            f"data.pass_rates: found no file at {path}, expected the samples.jsonl of `sd-search eval`"
        )
    rates = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            known = [own["figures"]["em"] for own in record["samples"] if "em" in own["figures"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is no line of an evaluation ({type(error).__name__}: {error}), expected what"
                " `sd-search eval` writes"
            ) from error
        if known:
            rates[record["question_id"]] = sum(known) / len(known)
    return rates


def _within(
    questions: Sequence[Question], rates: Mapping[str, float], data: DataConfig, path: str
) -> tuple[Question, ...]:
    low, high = data.pass_range
    known = [question for question in questions if question.id in rates]
    kept = tuple(question for question in known if low <= rates[question.id] <= high)
    told = f"{len(kept)} of {len(questions)} questions of {path} have a pass rate within {low:g} to {high:g}"
    if not kept:
        raise DataError(
            f"data.pass_rates: {told} ({len(known)} have one), expected some: evaluate these questions"
        )
    logger.info("%s; %d have none", told, len(questions) - len(known))
    return kept


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
        return tuple(self.at(place) for place in range(start, start + self.batch_size))

    def at(self, place: int) -> Item:
        """The question of a place of the order."""
        epoch, offset = divmod(place, len(self.questions))
        return self.questions[
            _permutation(len(self.questions), self.seed, epoch)[offset] if self.shuffle else offset
        ]


@dataclass(frozen=True, kw_only=True)
class MixedStream(Generic[Item]):
    """Several streams, each place of the order drawn by weight; as pure a function of the step. Every stream
    goes on where its last place left it, so a set is met in its own order."""

    streams: Sequence[QuestionStream[Item]]
    weights: tuple[float, ...]
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[Item, ...]:
        """The questions of optimiser step `step` (0-based): [batch_size]."""
        start = step * self.batch_size
        return tuple(self._at(place) for place in range(start, start + self.batch_size))

    def _at(self, place: int) -> Item:
        chunk, offset = divmod(place, _CHUNK)
        drawn = _drawn(chunk, self.seed, self.weights)
        own = int(drawn[offset])
        before = sum(int((_drawn(c, self.seed, self.weights) == own).sum()) for c in range(chunk))
        return self.streams[own].at(before + int((drawn[:offset] == own).sum()))


_CHUNK = 1 << 16  # places that are drawn at a time


@functools.lru_cache(maxsize=1024)
def _drawn(chunk: int, seed: int, weights: tuple[float, ...]) -> np.ndarray:
    """[_CHUNK] which stream each place of the chunk asks."""
    shares = np.array(weights) / sum(weights)
    return np.random.default_rng((seed, chunk)).choice(len(weights), size=_CHUNK, p=shares).astype(np.int16)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
