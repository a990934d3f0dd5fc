"""samples.jsonl: the append-only record of an evaluation, one JSON line a question, from which every report
is made.

A slice of questions is appended by one write that reaches the disk before the next slice starts, so a
killed evaluation loses the slice it was working on and nothing else; a line that the kill tore is cut off
when the evaluation goes on. A question that is run once more (its infrastructure had failed) gets a second
line, and the last line of a question counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics import rollout_figures
from megatron_sd.durable.files import append_lines
from megatron_sd.errors import DataError
from megatron_sd.records import Rollout, RolloutGroup, StopReason

SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One rollout of a question. retrieved: passage ids of each search, best first. figures: of
    eval/metrics.py by name."""

    answer: str | None
    stop_reason: StopReason
    queries: tuple[str, ...]
    retrieved: tuple[tuple[str, ...], ...]
    figures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class QuestionResult:
    """All samples of one question, in index order; as a JSON object one line of samples.jsonl."""

    question_id: str
    source: str
    question: str
    golden_answers: tuple[str, ...]
    samples: tuple[Sample, ...]

    @property
    def failed(self) -> bool:
        """A sample is no data, for infrastructure reasons: the question is run once more."""
        return any(sample.stop_reason.is_infrastructure for sample in self.samples)


def to_result(group: RolloutGroup, format_valid: Callable[[Rollout], float]) -> QuestionResult:
    """What is kept of a group."""
    question = group.question
    samples = tuple(
        Sample(
            answer=rollout.answer,
            stop_reason=rollout.stop_reason,
            queries=rollout.queries,
            retrieved=tuple(
                tuple(h.passage.id for h in turn.hits) for turn in rollout.turns if turn.query is not None
            ),
            figures=rollout_figures(rollout, question, format_valid),
        )
        for rollout in group.rollouts
    )
    return QuestionResult(
        question_id=question.id,
        source=question.source,
        question=question.text,
        golden_answers=question.golden_answers,
        samples=samples,
    )


def append_results(path: Path, results: Sequence[QuestionResult]) -> None:
    """Append the lines of some questions to samples.jsonl."""
    append_lines(path, map(dataclasses.asdict, results))


def read_lines(path: Path, *, is_ours: bool = True) -> list[dict[str, Any]]:
    """The JSON objects of a jsonl file. is_ours: what follows the last line break is half a line that a
    kill left, and is left out; other programs may end their files without one. Raises DataError for any
    other line that is none."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if is_ours and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            message = (
                f"{path}:{number} is no JSON object ({error}): {line[:80]!r}; the file was changed by hand or"
                " is damaged"
            )
            raise DataError(f"{message}: remove this line and run the same command again") from error
        records.append(record)
    return records


def read_results(path: Path) -> dict[str, QuestionResult]:
    """The newest result of every question, in order of first appearance; none when there is no file yet.
    Raises DataError."""
    if not path.exists():
        return {}
    results = {}
    for number, record in enumerate(read_lines(path), start=1):
        result = _to_result(record, f"{path}:{number}")
        results[result.question_id] = result
    return results


def _to_result(record: Mapping[str, Any], place: str) -> QuestionResult:
    try:
        samples = tuple(
            Sample(
                answer=sample["answer"],
                stop_reason=StopReason(sample["stop_reason"]),
                queries=tuple(sample["queries"]),
                retrieved=tuple(map(tuple, sample["retrieved"])),
                figures=dict(sample["figures"]),
            )
            for sample in record["samples"]
        )
        return QuestionResult(
            **{**record, "golden_answers": tuple(record["golden_answers"]), "samples": samples}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{place} is no line of an evaluation ({type(error).__name__}: {error}); expected what `sd-search"
            " eval` writes: choose another --output"
        ) from error
