"""Benchmark results: a printed table of ratios and one JSON file a machine, to compare with later."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two implementations measured in turn in one run; both figures in `unit`, smaller is better."""

    name: str
    ours: float
    theirs: float
    unit: str
    against: str

    @property
    def ratio(self) -> float:
        """theirs / ours."""
        return self.theirs / self.ours


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(benchmark: str, comparisons: Sequence[Comparison], json_path: Path | None) -> None:
    """Print the comparisons and, with a path, merge them into its JSON under the benchmark's name."""
    for c in comparisons:
        print(
            f"{c.name:<44} ours {c.ours:9.4g} {c.unit}   {c.against} {c.theirs:9.4g} {c.unit}   ratio"
            f" {c.ratio:6.2f}",
            flush=True,
        )
    if json_path is None:
        return
    known = json.loads(json_path.read_text()) if json_path.is_file() else {}
    known["machine"] = machine()
    known[benchmark] = [asdict(c) | {"ratio": round(c.ratio, 3)} for c in comparisons]
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(known, indent=2) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
