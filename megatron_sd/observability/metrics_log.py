"""metrics.jsonl: the append-only record of a run, of which TensorBoard is a view.

Lines are {"step": int, "metrics": {name: float}} in the order they were recorded. Every start of the run
first appends {"start": int}, the first step it is going to record: earlier lines of that step and later
ones are superseded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sd.errors import DataError

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to metrics.jsonl, one flushed line at a time."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open for appending; a line that a killed run left torn is ended first, so that it stays apart."""
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._file.write("\n" if is_torn else "")
        self._append({"start": first_step})

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step; a step may have several lines."""
        self._append({"step": step, "metrics": {name: float(value) for name, value in metrics.items()}})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, in order of step, superseded lines dropped, several lines of a step merged.

    A torn line is dropped where a kill can leave one: at the end, or right before a start. Raises DataError
    for any other line that does not parse, and for a missing file.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: expected the metrics.jsonl of a run directory")
    lines = path.read_bytes().splitlines()
    parsed = [parse_line(line) for line in lines]
    steps: dict[int, dict[str, float]] = {}
    for number, row in enumerate(parsed, start=1):
        if row is None:
            if number < len(parsed) and "start" not in (parsed[number] or {}):
                raise DataError(
                    f"{path}:{number} is no metrics line: {lines[number - 1][:80]!r}; the file was changed by"
                    " hand"
                )
        elif "start" in row:
            steps = {step: values for step, values in steps.items() if step < row["start"]}
        else:
            steps.setdefault(row["step"], {}).update(row["metrics"])
    return dict(sorted(steps.items()))


def newest_steps(path: Path) -> dict[str, int]:
    """The largest step that each metric was ever recorded at, superseded lines included; empty without a
    file."""
    newest: dict[str, int] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        row = parse_line(line)
        for name in (row or {}).get("metrics", ()):
            newest[name] = max(newest.get(name, row["step"]), row["step"])
    return newest


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The row of a line of metrics.jsonl; None for a line that is none: torn, or changed by hand."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_known = isinstance(row, dict) and (
        isinstance(row.get("start"), int) or {"step", "metrics"} <= row.keys()
    )
    return row if is_known else None
