"""Files of a run that grow while they are read: only what is new is read, and half a line is left for
later. Nothing is written and nothing is locked."""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sd.durable.growing_file import GrowingFile
from megatron_sd.observability.metrics_log import parse_line


@dataclass
class Column:
    """The values of one metric by step, ascending: 16 bytes a value."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def put(self, step: int, value: float) -> None:
        """The value of a step; of one that is known already, the newer."""
        place = len(self.steps)
        if place and step <= self.steps[-1]:
            place = bisect_left(self.steps, step)
        if place < len(self.steps) and self.steps[place] == step:
            self.values[place] = value
        else:
            self.steps.insert(place, step)
            self.values.insert(place, value)

    def cut(self, step: int) -> None:
        """Forget this step and all later ones."""
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.values[place:]

    def at(self, step: int) -> float | None:
        """The value of a step, if there is one."""
        place = bisect_left(self.steps, step)
        return self.values[place] if place < len(self.steps) and self.steps[place] == step else None


class MetricsFollower:
    """metrics.jsonl as it grows, by metric. Means what `read_metrics` means: a start supersedes what was
    recorded of its step and later ones, and a torn line right before a start, or at the end, is passed
    over."""

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._forget()
        self.revision = 0  # grows whenever something was read

    def _forget(self) -> None:
        self.columns: dict[str, Column] = {}
        self.unreadable = 0  # lines that are no metrics, and that no kill explains
        self._is_torn = False

    def look(self) -> None:
        """Take in what was appended since the last look."""
        new = self._file.take()
        if new.anew:
            self._forget()
        for line in new.lines:
            self._add(parse_line(line))
        self.revision += bool(new.lines or new.anew)

    @property
    def bytes_read(self) -> int:
        """Of the file as it is now."""
        return self._file.offset

    @property
    def newest_step(self) -> int | None:
        """The largest step that has a metric."""
        return max((own.steps[-1] for own in self.columns.values() if own.steps), default=None)

    def _add(self, row: Mapping[str, Any] | None) -> None:
        if self._is_torn and (row is None or "start" not in row):
            self.unreadable += 1
        self._is_torn = row is None
        if row is None:
            return
        if "start" in row:
            for column in self.columns.values():
                column.cut(row["start"])
            return
        try:
            known = {str(name): float(value) for name, value in row["metrics"].items()}
            for name, value in known.items():
                self.columns.setdefault(name, Column()).put(row["step"], value)
        except (AttributeError, TypeError, ValueError, OverflowError):
            self.unreadable += 1


@dataclass(frozen=True, kw_only=True)
class Transcripts:
    """The groups of one file of transcripts. step: after which it was written. mark: another one means other
    content. unreadable: how many lines are no records."""

    step: int
    groups: tuple[Mapping[str, Any], ...]
    mark: str
    unreadable: int


class TranscriptsFollower:
    """The newest file of transcripts/."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: Transcripts | None = None

    def look(self, newest_step: int | None) -> Transcripts | None:
        """The newest that the run has written by `newest_step`: later ones are of a start that was
        superseded. None without one. A file that has not changed is not read again."""
        found = {
            int(match[1]): path
            for path in self._directory.glob("step_*.jsonl")
            if (match := re.fullmatch(r"step_(\d+)", path.stem)) and int(match[1]) <= (newest_step or 0)
        }
        if not found:
            self._known = None
            return None
        step = max(found)
        try:
            status = found[step].stat()
            mark = f"{step}-{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
            if self._known is None or self._known.mark != mark:
                self._known = read_transcripts(found[step].read_bytes(), step, mark)
        except FileNotFoundError:  # it went while it was looked at
            self._known = None
        return self._known


def read_transcripts(content: bytes, step: int, mark: str) -> Transcripts:
    """The groups of a file of transcripts."""
    groups, unreadable = read_records(content)
    return Transcripts(step=step, groups=tuple(groups), mark=mark, unreadable=unreadable)


def read_records(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The objects of a jsonl file, and how many lines are none; half a line at its end is passed over."""
    *whole, _ = content.split(b"\n")
    records, unreadable = [], 0
    for line in whole:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable
