"""What an update gains from reading a group's prompt once: padded sequences against one row in which rollouts
share their prompt, in turn in one process.

    python -m benchmarks.training.shared_prompts [--model DIR] [--lengths few-shot] [--json FILE]

Rollouts of groups of five, policy loss and divergence, under ZeRO-3 in float32. few-shot: a worked example in
the prompt, one short search, as a model that was not trained to search needs it; search: a short prompt, four
searches of 500 tokens each, lengths as published, scaled to the machine. --model: a directory in the place of
random weights (Qwen2 of 4 layers x 256).
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
from benchmarks.training.realistic_rollouts import Lengths, samples

VOCABULARY, NUM_QUESTIONS = 4096, 2
SHAPES = {
    "few-shot": Lengths(prompt=300, turn=30, observation=60, answer=20, block=120, searches=1),
    "search": Lengths(prompt=80, turn=36, observation=200, answer=24, block=140, searches=4),
}
LAYOUTS = {
    "padded": {},
    "shared": {"model.attention": "varlen", "update.pack_sequences": "true"},
}
NUM_WARM_UP, NUM_ROUNDS = 1, 3


def build(model: Path, run_dir: Path, layout: str):
    """A policy under DeepSpeed, and its configuration."""
    from megatron_sd.building.policy import build_policy
    from megatron_sd.config.load import load
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import join_world

    settings = {
        "run_dir": run_dir,
        "model.path": model,
        "model.dtype": "float32",
        "data.train": "none",
        "retriever.corpus": "none",
        "policy_loss.kl_weight": 0,
        "update.max_microbatch_tokens": 4096,
        **LAYOUTS[layout],
    }
    config = load([f"--{key}={value}" for key, value in settings.items()])
    return build_policy(config, Parallel.of(config.update, join_world())), config


def seconds_of(policy, config, made: list, *, distils: bool) -> float:
    """Of one update, without the optimiser's step."""
    from megatron_sd.algorithm.assemble import own_batches
    from megatron_sd.algorithm.distill_loss import TermWeights

    alpha = 0.3 if distils else 0.0
    weights = TermWeights(policy=1.0, distill_spread=alpha, distill_no_spread=alpha)
    started = time.perf_counter()
    (batch,) = own_batches(
        made, config=config.update, aggregation="token", layout=config.layout, place=(0, 1)
    )
    for microbatch in batch:
        policy.accumulate(microbatch, batch.totals, weights)
    seconds = time.perf_counter() - started
    policy.forget_accumulated()
    return seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lengths", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    comparisons = []
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or Path(directory) / "model"
        if arguments.model is None:
            write_model(model, vocabulary=VOCABULARY, hidden=256, layers=4)
        built = {layout: build(model, Path(directory) / layout, layout) for layout in LAYOUTS}
        for name in arguments.lengths:
            made = samples(arguments.questions, VOCABULARY, lengths=SHAPES[name])
            for loss, distils in (("GRPO", False), ("SD-Search", True)):
                figures: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
                for _ in range(NUM_WARM_UP + arguments.rounds):
                    for layout, (policy, config) in built.items():
                        figures[layout].append(seconds_of(policy, config, made, distils=distils))
                medians = {
                    layout: statistics.median(seconds[NUM_WARM_UP:]) for layout, seconds in figures.items()
                }
                sides = {"ours": medians["shared"], "theirs": medians["padded"]}
                comparisons.append(
                    Comparison(name=f"update, {name}, {loss}", unit="s", against="padded", **sides)
                )
    report("shared_prompts", comparisons, arguments.json)


if __name__ == "__main__":
    main()
