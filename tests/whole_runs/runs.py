"""Runs through the real door, as processes of their own, and what they left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from launch.local import TRAIN, command_line, free_port
from megatron_sd.observability.metrics_log import read_metrics


def start(num_ranks: int, argv: Sequence[str], program: str = TRAIN) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = command_line(num_ranks, free_port(), argv, program)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(num_ranks: int, argv: Sequence[str], program: str = TRAIN) -> str:
    process = start(num_ranks, argv, program)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def parameters(run_dir: Path, step: str) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / step / "model" / "model.safetensors")


def without_clocks(run_dir: Path) -> dict[int, dict[str, float]]:
    steps = read_metrics(run_dir / "metrics.jsonl")
    return {s: {k: v for k, v in m.items() if not k.startswith(("time/", "mem/"))} for s, m in steps.items()}
