"""A plain GRPO step (generation and update, no search) against TRL's GRPOTrainer, step by step in turn in
one process.

    python -m benchmarks.training.grpo_step [--json FILE]          needs trl, a benchmark-only dependency

80 completions of 64 tokens (16 prompts x 5) on 96-token prompts; Qwen2 of 4 layers x 128, vocabulary 1,024,
float32, two threads, no KL, one optimiser step. Ours runs under DeepSpeed ZeRO-3. Neither side pays for its
first step.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.baseline import Comparison, report
from benchmarks.tiny_model import write_model
from benchmarks.training.grpo_sides import OurStep, Work, run_trl

WORK = Work(num_prompts=16, group_size=5, prompt_tokens=96, completion_tokens=64, microbatch_tokens=16_384)
NUM_WARM_UP_STEPS, NUM_STEPS = 2, 8


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(model, vocabulary=1024, hidden=128, layers=4)
        ours: list[OurStep] = []

        def our_turn() -> None:
            # after TRL was built: a process group would make it wrap its model for several ranks
            if not ours:
                ours.append(OurStep(model, WORK))
            started = time.perf_counter()
            ours[0]()
            seconds.append(time.perf_counter() - started)

        theirs = run_trl(model, WORK, NUM_WARM_UP_STEPS + NUM_STEPS, our_turn)
    median_ours = statistics.median(seconds[NUM_WARM_UP_STEPS:])
    median_theirs = statistics.median(theirs[NUM_WARM_UP_STEPS:])
    print("seconds, ours", [round(s, 2) for s in seconds], "TRL", [round(s, 2) for s in theirs])
    report(
        "grpo_step",
        [Comparison(name="GRPO step", ours=median_ours, theirs=median_theirs, unit="s", against="TRL")],
        arguments.json,
    )


if __name__ == "__main__":
    main()
