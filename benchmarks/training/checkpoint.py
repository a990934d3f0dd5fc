"""What a checkpoint keeps the loop from: written at once, against copied to host memory and written while the next
step runs (checkpoint.background).

    python -m benchmarks.training.checkpoint [--json FILE]

A Qwen2 of 50 M parameters in float32 under ZeRO-3 after one AdamW step, 0.8 GB a checkpoint; saves of both kinds
in turn. Seconds of `save`, and for the second kind those until the checkpoint is there.
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

from benchmarks.baseline import Comparison, report
from benchmarks.tiny_model import write_model
from benchmarks.training.realistic_rollouts import Lengths, samples

VOCABULARY, NUM_WARM_UP, NUM_SAVES = 32_768, 1, 4
KINDS = ("at once", "in the background")


def main() -> None:
    """Measure and report."""
    from megatron_sd.algorithm.distill_loss import POLICY_TERM
    from megatron_sd.algorithm.packing.batches import pack
    from megatron_sd.building.policy import build_policy
    from megatron_sd.config.load import load
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import join_world
    from megatron_sd.training.state.checkpoint import Checkpoints

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    on_path: dict[str, list[float]] = {kind: [] for kind in KINDS}
    until_there: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        model, world = Path(directory) / "model", join_world()
        write_model(model, vocabulary=VOCABULARY, hidden=512, layers=8)
        settings = {"model.path": model, "model.dtype": "float32", "run_dir": f"{directory}/run"}
        settings |= {"data.train": "none", "retriever.corpus": "none", "policy_loss.kl_weight": 0}
        given = [f"--{key}={value}" for key, value in settings.items()]
        configs = {kind: load([*given, f"--checkpoint.background={kind != KINDS[0]}"]) for kind in KINDS}
        policy = build_policy(configs[KINDS[0]], Parallel.of(configs[KINDS[0]].update, world))
        (batch,) = pack(
            samples(1, VOCABULARY, lengths=Lengths().scaled(0.1)),
            max_tokens=4096,
            world_size=1,
            aggregation="token",
        )
        for microbatch in batch:
            policy.accumulate(microbatch, batch.totals, POLICY_TERM)
        policy.step()
        kept = {
            kind: Checkpoints(Path(directory) / kind, config, world, corpus_version="none")
            for kind, config in configs.items()
        }
        for step in range(1, NUM_WARM_UP + NUM_SAVES + 1):
            for kind, checkpoints in kept.items():
                started = time.perf_counter()
                checkpoints.save(policy, step=step, state={}, wait=False)
                on_path[kind].append(time.perf_counter() - started)
                checkpoints.settle()
                until_there += [time.perf_counter() - started] if kind == KINDS[1] else []
    at_once, copied = (statistics.median(on_path[kind][NUM_WARM_UP:]) for kind in KINDS)
    print(f"in the background it is there after {statistics.median(until_there[NUM_WARM_UP:]):.2f} s")
    report(
        "checkpoint",
        [Comparison(name="a save", ours=copied, theirs=at_once, unit="s", against="at once")],
        arguments.json,
    )


if __name__ == "__main__":
    main()
