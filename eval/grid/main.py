"""`sd-search grid --config GRID.yaml`: arms x start policies x seeds, run where they are missing, then
tables and plots.

Below `output`:

    runs/ARM-START-SEED.json    one finished run each (records.py)
    logs/                       what the workers printed
    results.md, results.json    paired differences, intervals, Holm; results.svg: the same as a picture, with learning curves
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eval.grid.plan import GridConfig, Run, plan
from eval.grid.plot import draw
from eval.grid.pool import DONE, Order, run_all
from eval.grid.records import RunRecord, read_fitting
from eval.grid.table import summarize, to_json, to_markdown
from eval.grid.worker import as_order
from megatron_sd.config.command_line import parse
from megatron_sd.errors import MegatronSdError

MAX_FAILURES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run of the plan, its file, and what it found, if it is finished."""

    run: Run
    path: Path
    record: RunRecord | None


def main(argv: Sequence[str]) -> None:
    """The command line of `grid`; the same command goes on where it was stopped."""
    config = parse(GridConfig, argv, "sd-search grid")
    failures = {} if config.table_only else run_grid(config)
    print(f"\n{write_results(config)}")
    if failures:
        shown = "; ".join(f"{name}: {said}" for name, said in list(failures.items())[:MAX_FAILURES_SHOWN])
        raise MegatronSdError(
            f"{len(failures)} runs failed, the others are kept; the same command runs them again ({shown})"
        )


def run_grid(config: GridConfig) -> dict[str, str]:
    """Run what has no complete record yet; returns the failures by name of the run.

    Raises ConfigError or DataError before any run for a grid that is wrong, or whose finished runs had
    other settings.
    """
    missing = [
        cell
        for cell in read_cells(config)
        if cell.record is None and cell.run.arm in (config.only or config.arms)
    ]
    orders = [Order(name=cell.run.name, line=as_order(cell.run, config, cell.path)) for cell in missing]
    logs = Path(config.output) / "logs"
    for directory in (logs, Path(config.output) / "runs"):
        directory.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    with tqdm(total=len(orders), desc="grid", unit="run", disable=None) as progress:

        def on_end(name: str, said: str) -> None:
            if said != DONE:
                failures[name] = said
                progress.write(f"{name} failed: {said}")
            progress.update()

        if orders:
            run_all(
                orders, num_workers=config.num_workers, devices=config.devices, log_dir=logs, on_end=on_end
            )
    return failures


def read_cells(config: GridConfig) -> list[Cell]:
    """Every run of the plan with its record, None where it is missing or half written."""
    cells = []
    for run in plan(config):
        path = Path(config.output) / "runs" / f"{run.name}.json"
        cells.append(Cell(run=run, path=path, record=read_fitting(path, run.digest)))
    return cells


def write_results(config: GridConfig) -> str:
    """Table and picture of the finished runs; returns the table."""
    cells = read_cells(config)
    records = [cell.record for cell in cells if cell.record is not None]
    summary = summarize(records, config)
    missing = Counter(cell.run.arm for cell in cells if cell.record is None)
    text = to_markdown(summary, config, missing)
    output = Path(config.output)
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(to_json(summary), indent=1) + "\n", encoding="utf-8")
    (output / "results.svg").write_text(draw(records, summary, config), encoding="utf-8")
    return text
