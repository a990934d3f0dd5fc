"""Whole runs, as processes of their own, and what they left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from launch.local import TRAIN, command_line, free_port
from megatron_sd.observability.metrics_log import read_metrics
from tests.nursery import Ranks, nursery

LIMIT_S = 300
START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"


def on_the_world(world: Path, run_dir: Path, *options: str) -> list[str]:
    """Arguments of a run from the committed start policy on a world's train questions."""
    return [
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        f"--run_dir={run_dir}",
        f"--model.path={START_POLICY}",
        f"--data.train={world / 'questions.jsonl'}",
        f"--retriever.corpus={world / 'corpus'}",
        *options,
    ]


def start(num_ranks: int, argv: Sequence[str], program: str = TRAIN) -> Ranks:
    """Forked ranks, as a launcher would start them."""
    return nursery().start(f"{program}:main", list(argv), ranks=num_ranks)


def run(num_ranks: int, argv: Sequence[str], program: str = TRAIN) -> str:
    """What forked ranks of a whole run printed."""
    return start(num_ranks, argv, program).succeed(LIMIT_S)


def run_launched(num_ranks: int, argv: Sequence[str], program: str = TRAIN) -> str:
    """The same through the real door: python for one rank, DeepSpeed's launcher for several."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = command_line(num_ranks, free_port(), argv, program)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def parameters(run_dir: Path, step: str) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / step / "model" / "model.safetensors")


def without_clocks(run_dir: Path) -> dict[int, dict[str, float]]:
    steps = read_metrics(run_dir / "metrics.jsonl")
    return {s: {k: v for k, v in m.items() if not k.startswith(("time/", "mem/"))} for s, m in steps.items()}
