"""`make trust`: every trust test at full counts, and docs/trust.md with what came out.

python -m tests.trust [--only R1,R4] [--share 0.1] [--output docs/trust.md]     share: of the full counts
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.nursery import Nursery
from tests.trust.disk import damages, faults, killed_commits
from tests.trust.faults import KINDS, PLACES, not_finite, refusals, spikes, stuck_ranks
from tests.trust.kills import kills, newest, stops, straight_or_killed
from tests.trust.resize import resized
from tests.trust.rows import Bench, Row, make_small_world

TIMEOUT_S = 20.0  # of the watchdog: steps take a second or two on two busy cores


def damaged_checkpoint(bench: Bench, offsets: int) -> Row:
    """R4 on the checkpoint of a short run."""
    argv = bench.argv("damaged", "--num_steps=1")
    assert bench.nursery.train(argv, ranks=2, log=bench.directory / "damaged.log").wait() == [0, 0]
    run_dir = bench.directory / "damaged"
    return damages(bench, run_dir / "checkpoints" / f"step_{newest(run_dir):08d}", offsets=offsets)


def tests(share: float) -> dict[str, list[Callable[[Bench], Row]]]:
    """By name, at this share of the full counts."""
    return {
        "R1": [lambda bench: kills(bench, count=_at(200, share))],
        "R2": [
            lambda bench: faults(bench, stride=_at(1, 1 / share)),
            lambda bench: killed_commits(bench, stride=_at(1, 1 / share)),
        ],
        "R3": [
            lambda bench: straight_or_killed(bench, stages=(0, 1, 2, 3), steps=20),
            lambda bench: resized(bench),
        ],
        "R4": [lambda bench: damaged_checkpoint(bench, offsets=_at(20, share))],
        "R5": [lambda bench: stops(bench, count=_at(50, share))],
        "R7": [lambda bench: stuck_ranks(bench, kinds=KINDS, places=PLACES, timeout_s=TIMEOUT_S)],
        "R8": [lambda bench: not_finite(bench, stages=(0, 1, 2, 3)), lambda bench: refusals(bench)],
        "R9": [lambda bench: spikes(steps=10_000, num_spikes=20)],
    }


def _at(full: int, share: float) -> int:
    return max(1, round(full * share))


def main(argv: list[str]) -> int:
    """Run, print each row as it comes, keep them beside the table, and write the table. 1 when a trial
    failed."""
    parser = argparse.ArgumentParser(prog="make trust", allow_abbrev=False)
    parser.add_argument("--only", default="")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("docs/trust.md"))
    parser.add_argument("--rows", type=Path, default=Path("runs/trust.jsonl"))
    options = parser.parse_args(argv)
    chosen = [name for name in options.only.split(",") if name]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="trust") as name:
        directory = Path(name)
        world = make_small_world(directory / "world")
        with Nursery() as nursery:
            bench = Bench(directory=directory, world=world, nursery=nursery, random=Random(0))
            for test, makers in tests(options.share).items():
                for make in makers if not chosen or test in chosen else ():
                    began = time.monotonic()
                    failed += _report(make(bench), time.monotonic() - began, options.rows)
    write_table(options.rows, options.output)
    return 1 if failed else 0


def _report(row: Row, took_s: float, rows: Path) -> int:
    print(f"{row.test}  {row.passed}/{row.count}  {took_s:.0f} s  {row.what}; {row.figures}", flush=True)
    for failure in row.failures:
        print(f"    {failure}", flush=True)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps(vars(row) | {"took_s": round(took_s), "date": time.strftime("%Y-%m-%d")}) + "\n"
        )
    return row.count - row.passed


HEAD = """\
# What a run survives, and how that was tested

`make trust` runs everything below at full counts and writes this file; `make test` runs a small sample of each. Two ranks train
for real (DeepSpeed on gloo, rollouts, retrieval, checkpoints) on a small model, as forked processes. A row holds
what came out when it was last run. R6, requeueing under a real SLURM, is a test of `launch/`.

| test | what | passed | measured | date |
|---|---|---|---|---|
"""


WHERE = (
    '"Bit for bit" holds on CPUs, with the same number of\nthreads. On GPUs it holds for what is on disk (a'
    " checkpoint loads as it was written); steps taken again differ by\nrounding, since GPUs add in changing"
    " order. Nothing here has run on one.\n"
)


def write_table(rows: Path, output: Path) -> None:
    """The newest row of every test."""
    newest_rows: dict[str, dict] = {}
    for line in rows.read_text(encoding="utf-8").splitlines():
        own = json.loads(line)
        newest_rows[f"{own['test']} {own['what']}"] = own
    lines = [
        f"| {own['test']} | {own['what']} | {own['passed']} of {own['count']} | {own['figures'] or 'none'} |"
        f" {own['date']} |"
        for _, own in sorted(newest_rows.items())
    ]
    machine = (
        f"\nOn {os.cpu_count()} cores, {platform.machine()}, no GPU, busy with other work; seconds are upper"
        " bounds."
    )
    rest = output.read_text(encoding="utf-8").partition("## ")[2] if output.exists() else ""
    output.write_text(
        HEAD + "\n".join(lines) + f"\n{machine} {WHERE}" + (f"\n## {rest}" if rest else ""), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
