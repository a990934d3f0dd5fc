"""A GRPO step of a real model, full float32 training: seconds and peak memory against TRL's GRPOTrainer on
the same tokens.

    python -m benchmarks.training.real_model MODEL_DIR [--sides one trl two] [--sampled 400] [--json FILE]

It needs trl. 20 rollouts (4 prompts x 5) of 600 tokens, 400 of them sampled and the others prompt;
microbatches of at most 2,048 tokens (TRL: as many whole rollouts as fit); gradient checkpointing on both
sides, no KL, two optimiser steps: seconds are the second's, and so is the memory that counts, since AdamW's
moments are there from the end of the first on. Each side has a process of its own, one after the other; `two`
is ours on two ranks, whose memory is summed. Memory is the resident set's peak, libraries included (Linux);
pages of the model's file that ranks share count for each of them. The generation of both sides is in the
step. Two minutes of work on the smallest models, an hour on one of 0.5B parameters and two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.baseline import Comparison, report
from benchmarks.training.grpo_sides import OurStep, Work, run_trl

NUM_TOKENS = 600  # of a rollout
RANKS = {"one": 1, "trl": 1, "two": 2}
MARK = "FIGURES "


def peak_gib() -> float:
    """The most this process has ever had resident."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 2**20


def work_of(num_sampled: int) -> Work:
    """The step's rollouts, of which so many tokens are sampled."""
    return Work(
        num_prompts=4,
        group_size=5,
        prompt_tokens=NUM_TOKENS - num_sampled,
        completion_tokens=num_sampled,
        microbatch_tokens=2048,
        gradient_checkpointing=True,
    )


def measure_here(model: Path, side: str, work: Work) -> None:
    """One process of a side: two steps, then its figures as a line."""
    if side == "trl":
        seconds = run_trl(model, work, 2)[-1]
    else:
        step = OurStep(model, work)
        step()
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
    print("\n" + MARK + json.dumps({"seconds": seconds, "gib": peak_gib()}), flush=True)
    os._exit(0)


def measure(model: Path, side: str, num_sampled: int) -> tuple[float, float]:
    """Seconds of the slowest process of a side, and GiB of all."""
    from launch.local import free_port

    ranks = RANKS[side]
    launcher = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--no_local_rank",
    ]
    start = [*launcher, "--log_level", "error"] if ranks > 1 else []
    command = [
        sys.executable,
        *start,
        "--module" if start else "-m",
        __spec__.name,
        str(model),
        "--here",
        side,
        "--sampled",
        str(num_sampled),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1))}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [
        json.loads(line.removeprefix(MARK)) for line in finished.stdout.splitlines() if line.startswith(MARK)
    ]
    if len(found) != ranks:
        raise SystemExit(
            f"{side}: {len(found)} of {ranks} processes came to the end:\n{finished.stdout}{finished.stderr}"
        )
    seconds, gib = max(own["seconds"] for own in found), sum(own["gib"] for own in found)
    print(
        f"{side:>4}: {seconds:7.1f} s a step, {work_of(num_sampled).num_tokens / seconds:7.1f} tokens/s, peak {gib:6.2f} GiB",
        flush=True,
    )
    return seconds, gib


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", nargs="?", type=lambda path: Path(path).resolve(), help="directory of a pretrained model"
    )
    parser.add_argument("--sides", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--here", choices=RANKS, help="of one process, started by this program")
    parser.add_argument("--sampled", type=int, default=400, help="of a rollout's 600 tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        print("not measured: it needs the directory of a pretrained model")
        return
    if arguments.here:
        measure_here(arguments.model, arguments.here, work_of(arguments.sampled))
    with tempfile.TemporaryDirectory() as directory:  # for what the sides write beside the model
        model = Path(directory) / "model"
        model.mkdir()
        for file in arguments.model.iterdir():
            (model / file.name).symlink_to(file)
        found = {side: measure(model, side, arguments.sampled) for side in arguments.sides}
    if "trl" not in found:
        return
    theirs = found["trl"]
    names = {"one": "one rank", "two": "two ranks"}
    comparisons = [
        Comparison(
            name=f"{names[side]}: {what}", ours=found[side][n], theirs=theirs[n], unit=unit, against="TRL"
        )
        for side in names
        if side in found
        for n, what, unit in ((0, "GRPO step", "s"), (1, "peak memory", "GiB"))
    ]
    report("real_model", comparisons, arguments.json)


if __name__ == "__main__":
    main()
