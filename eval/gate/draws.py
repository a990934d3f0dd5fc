"""draws.jsonl: the rollouts that a gate has sampled, a line a slice: the same command goes on where it was
killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.samples import read_lines
from megatron_sd.compact import as_fields
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.errors import DataError
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.rollout.stored import rollout_of

DRAWS_NAME = "draws.jsonl"


class Draws:
    """The slices in `directory`; without one nothing is found and nothing kept."""

    def __init__(self, directory: Path | None):
        self._path = None if directory is None else directory / DRAWS_NAME
        self._found: dict[tuple[int, int], dict[str, Any]] = {}

    def read(self) -> None:
        """Find what is there. Raises DataError for a damaged file."""
        if self._path is not None and self._path.exists():
            self._found = {(line["draw"], line["start"]): line for line in read_lines(self._path)}

    def mend(self) -> None:
        """Cut what a kill left of a line off; before anybody reads."""
        if self._path is not None:
            cut_torn_line(self._path)

    def find(self, draw: int, start: int, questions: Sequence[Question]) -> list[RolloutGroup] | None:
        """The groups of a slice, or None. Raises DataError when the file has other questions there."""
        line = self._found.get((draw, start))
        if line is None:
            return None
        ids = [question.id for question in questions]
        if line["questions"] != ids:
            raise DataError(
                f"{self._path}: draw {draw} has questions {line['questions'][:3]} from place {start} on,"
                f" expected {ids[:3]}: the file was changed, or is of another gate; choose another --output"
            )
        rollouts = (tuple(rollout_of(fields) for fields in group) for group in line["groups"])
        return [
            RolloutGroup(question=question, rollouts=own)
            for question, own in zip(questions, rollouts, strict=True)
        ]

    def keep(self, draw: int, start: int, groups: Sequence[RolloutGroup]) -> None:
        """Write a slice down, and wait until the disk has it."""
        if self._path is not None:
            line = {
                "draw": draw,
                "start": start,
                "questions": [group.question.id for group in groups],
                "groups": [[as_fields(rollout) for rollout in group.rollouts] for group in groups],
            }
            append_lines(self._path, [line])
