"""What SD-Search and PPO cost over GRPO: one trainer of each, from the same start policy on the synthetic
world, step by step in turn.

    python -m benchmarks.training.overhead [--json FILE]

Ratios are GRPO's seconds over SD-Search's: 0.90 means that SD-Search takes 1 / 0.90 = 1.11 times as long.
In the demo's world rollouts are as short as their hindsight blocks, the worst case for the teacher's
forward; the second shape has observations of 400 tokens, as real passages give. Steps that measure the
gradient ratio (three updates instead of one) are timed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.baseline import Comparison, report

NUM_WARM_UP_STEPS, NUM_STEPS = 2, 12
SHAPES = {
    "demo": (),
    "400-token observations": (
        "--rollout.questions_per_step=2",
        "--retriever.top_k=30",
        "--rollout.max_observation_tokens=400",
        "--rollout.max_rollout_tokens=2048",
    ),
}
ARMS = {
    "GRPO": ("--distill.block=none",),
    "SD-Search, gated": (),
    "SD-Search, every group": ("--distill.gate=none",),
    "PPO with a critic": (
        "--distill.block=none",
        "--advantage.estimator=gae",
        "--critic.learning_rate=1e-12",
    ),
}
MEASURED = "update with measurement"


def build(world: Path, run_dir: Path, *overrides: str):
    """A trainer of the demo's recipe that writes nothing but its metrics."""
    from megatron_sd.building.trainer import build_trainer
    from megatron_sd.config.load import load
    from megatron_sd.distributed.world import join_world

    arguments = [
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        f"--model.path={files('data_prep') / 'coldstart_model'}",
        f"--data.train={world / 'questions.jsonl'}",
        f"--retriever.corpus={world / 'corpus'}",
        f"--run_dir={run_dir}",
        "--distill.alpha.warmup_steps=0",
        "--distill.alpha.mode=fixed",
        f"--distill.measure_every={NUM_STEPS // 2}",
        "--log.transcripts_every=0",
        "--optimizer.learning_rate=1e-12",  # the arms stay the same policy, whose rollouts are the same
        *overrides,
    ]
    trainer = build_trainer(load(arguments), join_world())
    trainer.resume()  # gives the engine its weights
    return trainer


def phases(trainer) -> dict[str, float]:
    """Take one step; seconds by phase."""
    seconds: dict[str, float] = {}
    trainer.recorder.record = lambda _, metrics: seconds.update(metrics)
    started = time.perf_counter()
    trainer.take_step()
    whole = time.perf_counter() - started
    update = "update" if "distill/grad_ratio" not in seconds else MEASURED
    return {update: seconds["time/update_s"], "whole step": whole if update == "update" else float("nan")}


def median_phases(world: Path, run_dir: Path, shape: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median seconds by arm and phase, the arms' steps in turn."""
    trainers = {name: build(world, run_dir / name, *shape, *overrides) for name, overrides in ARMS.items()}
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ARMS}
    for step in range(NUM_WARM_UP_STEPS + NUM_STEPS):
        for name, trainer in trainers.items():
            for phase, seconds in phases(trainer).items():
                if step >= NUM_WARM_UP_STEPS and seconds == seconds:
                    figures[name].setdefault(phase, []).append(seconds)
    return {name: {phase: statistics.median(s) for phase, s in own.items()} for name, own in figures.items()}


def compare(shape: str, medians: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Every arm against GRPO, phase by phase."""
    plain = medians["GRPO"]
    return [
        Comparison(
            name=f"{shape}, {name}: {phase}",
            ours=seconds,
            theirs=plain[phase.split(" with ")[0]],
            unit="s",
            against="GRPO",
        )
        for name, own in medians.items()
        if name != "GRPO"
        for phase, seconds in own.items()
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as directory:
        from data_prep.world.world import WorldConfig
        from launch.programs import make_world

        world = Path(directory) / "world"
        make_world(WorldConfig(output=str(world)))
        for shape, overrides in SHAPES.items():
            comparisons += compare(shape, median_phases(world, Path(directory) / shape, overrides))
    report("overhead", comparisons, arguments.json)


if __name__ == "__main__":
    main()
