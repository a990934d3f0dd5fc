"""What each estimator of advantages costs beside the step that it is part of, on the demo's own rollouts.

    python -m benchmarks.algorithm.estimators [--json FILE]

Ratios are the whole GRPO step's seconds over the estimator's: 50 means 2 % of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.baseline import Comparison, report
from benchmarks.training.overhead import build, phases

NUM_WARM_UP_STEPS, NUM_STEPS, NUM_REPEATS = 1, 5, 5
ALONE = ("gae", "one")  # a critic's, and of stored rollouts: constants


def measured(world: Path, run_dir: Path) -> tuple[float, list]:
    """Median seconds of a whole step, and the scored groups of every step that was timed."""
    trainer = build(world, run_dir, "--distill.block=none")
    seconds, steps = [], []
    collect = trainer.collect

    def keeping(sample):
        steps.append(collect(sample))
        return steps[-1]

    keeping.metrics = collect.metrics
    trainer.collect = keeping
    for _ in range(NUM_WARM_UP_STEPS + NUM_STEPS):
        seconds.append(phases(trainer)["whole step"])
    return statistics.median(seconds[NUM_WARM_UP_STEPS:]), steps[NUM_WARM_UP_STEPS:]


def median_seconds(estimator, config, steps: Sequence) -> float:
    """Of one call on the groups of a step."""
    found = []
    for groups in steps:
        for _ in range(NUM_REPEATS):
            started = time.perf_counter()
            estimator(groups, config)
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        from data_prep.world.world import WorldConfig
        from launch.programs import make_world
        from megatron_sd.algorithm.advantages.table import ADVANTAGES
        from megatron_sd.config import AdvantageConfig

        world = Path(directory) / "world"
        make_world(WorldConfig(output=str(world)))
        step_s, steps = measured(world, Path(directory) / "run")
        comparisons = [
            Comparison(
                name=f"{name}: {len(steps[0])} groups of {len(steps[0][0].rollouts)}",
                ours=median_seconds(estimator, AdvantageConfig(), steps),
                theirs=step_s,
                unit="s",
                against="the whole step",
            )
            for name, estimator in ADVANTAGES.items()
            if name not in ALONE
        ]
    report("estimators", comparisons, arguments.json)


if __name__ == "__main__":
    main()
