"""Steps an hour where one search in a hundred takes 30 s: carried over (rollout.max_lag 4), against waited for.

    python -m benchmarks.rollout.stragglers [--engine vllm] [--steps 12] [--lags 0 1 4] [--json FILE]

Training on the synthetic world with the demo's recipe, one run after the other; searches wait for a lognormal time
with a median of 0.2 s (slow_searches.py). The first step of each is not counted. --engine vllm needs an environment
with vLLM (make .venv-vllm/ready).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.baseline import Comparison, report
from benchmarks.training.overhead import build

SEARCHES = f"{Path(__file__).with_name('slow_searches.py')}:search"


def seconds_per_step(world: Path, run_dir: Path, lag: int, num_steps: int, engine: str) -> float:
    """Of steps after the first, of a run that has further steps to sample for."""
    trainer = build(
        world,
        run_dir,
        "--retriever.corpus=null",
        f"--retriever.function={SEARCHES}",
        "--retriever.client.deadline_s=120",
        "--distill.measure_every=0",
        f"--num_steps={num_steps + 9}",
        f"--rollout.max_lag={lag}",
        f"--rollout.engine={engine}",
        *(["--rollout.vllm.kv_cache_gib=0.25"] if engine == "vllm" else []),
    )
    with contextlib.closing(trainer.engine):
        trainer.take_step()
        started = time.perf_counter()
        for number in range(num_steps):
            trainer.take_step()
            print(f"max_lag {lag}, step {number + 1}: {time.perf_counter() - started:.0f} s", flush=True)
        return (time.perf_counter() - started) / num_steps


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--steps", type=int, default=12, help="that are counted")
    parser.add_argument(
        "--lags", type=int, nargs="+", default=[0, 4], help="the first is what others are compared with"
    )
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        from data_prep.world.world import WorldConfig
        from launch.programs import make_world

        world = Path(directory) / "world"
        make_world(WorldConfig(output=str(world)))
        os.environ["SLOW_CORPUS"] = str(world / "corpus")
        seconds = {
            lag: seconds_per_step(world, Path(directory) / str(lag), lag, arguments.steps, arguments.engine)
            for lag in arguments.lags
        }
    first, *others = seconds
    comparisons = [
        Comparison(
            name=f"a step, max_lag {lag}, {arguments.engine}",
            ours=seconds[lag],
            theirs=seconds[first],
            unit="s",
            against=f"max_lag {first}",
        )
        for lag in others
    ]
    report("stragglers", comparisons, arguments.json)


if __name__ == "__main__":
    main()
