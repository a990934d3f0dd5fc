"""R3: resuming on another number of ranks, or at another ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.trust.disk import tiny_model
from tests.trust.rows import Bench, Row, row

# stage, ranks -> stage, ranks
CASES = [(3, 1, 3, 2), (3, 2, 3, 1), (3, 2, 1, 2), (1, 2, 3, 2), (2, 2, 0, 1), (0, 1, 3, 2)]
TOLERANCE = 1e-6


def resized(bench: Bench, cases: Sequence[tuple[int, int, int, int]] = CASES) -> Row:
    """Two steps, a checkpoint, and one step more: on the same ranks, and on others."""
    failures, largest, moved = [], 0.0, 0.0
    log = bench.directory / "resized.log"
    for case in cases:
        (stage, ranks, new_stage, new_ranks), name = case, "_".join(map(str, case))
        checkpoint = bench.directory / f"resized_{name}"
        parts = (("saved", stage), ("loaded", new_stage))
        orders = [_order(bench, f"{name}_{part}", checkpoint, steps=2, stage=at) for part, at in parts]
        for order, size in ((orders[0], ranks), (orders[1], new_ranks)):
            started = bench.nursery.start(
                "tests.rank_programs.update_steps:run", json.dumps([order]), ranks=size, log=log
            )
            if started.wait() != [0] * size:
                failures.append(f"{case}: {started.output()[-1500:]}")
        if failures:
            break
        saved, loaded = (torch.load(f"{order['output']}.0") for order in orders)
        same = all(
            torch.equal(saved["parameters"][key], tensor) for key, tensor in loaded["parameters"].items()
        )
        parts = (("same", stage), ("other", new_stage))
        then = [_order(bench, f"{name}_{part}", checkpoint, steps=3, stage=at) for part, at in parts]
        for order, size in zip(then, (ranks, new_ranks)):
            order["save"] = False
            started = bench.nursery.start(
                "tests.rank_programs.update_steps:run", json.dumps([order]), ranks=size, log=log
            )
            if started.wait() != [0] * size:
                failures.append(f"{case}: {started.output()[-1500:]}")
        one, other = (torch.load(f"{order['output']}.0") for order in then)
        difference = max(
            float((one["parameters"][key] - tensor).abs().max())
            for key, tensor in other["parameters"].items()
        )
        largest = max(largest, difference)
        moved = max(
            float((one["parameters"][key] - tensor).abs().max())
            for key, tensor in saved["parameters"].items()
        )
        if not same or difference > TOLERANCE:
            failures.append(
                f"{case}: loaded equals saved: {same}; after one step more {difference:.1e} apart"
            )
    arrows = ", ".join(f"ZeRO {a} on {b} to ZeRO {c} on {d}" for a, b, c, d in cases)
    figures = f"loaded weights are equal bit for bit; one step later they are at most {largest:.1e} apart, "
    figures += f"where the step moves them by {moved:.0e}; {arrows}"
    what = "resume on another number of ranks or at another ZeRO stage, <= 1e-6"
    return row("R3", what, failures, count=len(cases), figures=figures)


def _order(bench: Bench, name: str, checkpoint: Path, *, steps: int, stage: int) -> dict:
    output = bench.directory / f"resized_{name}.out"
    config = {
        "update": {"zero_stage": stage},
        "distill": {"measure_every": 0},
        "optimizer": {"learning_rate": 1e-5},
    }
    paths = {"model": f"{tiny_model(bench)}", "output": f"{output}", "checkpoint": f"{checkpoint}"}
    return {**paths, "steps": steps, "config": config}
