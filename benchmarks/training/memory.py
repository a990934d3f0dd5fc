"""Peak memory of an update: rows through the head in chunks, against full [T, V] logits of student and
teacher.

    python -m benchmarks.training.memory [--json FILE]

One microbatch of 8 x 512 tokens, half of them sampled, 5 % query tokens; Qwen2 of 2 layers x 128,
vocabulary 32,768, float32. Each side runs in a process of its own; the figure is the growth of its peak
resident memory over the microbatch.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch

from benchmarks.baseline import Comparison, report
from benchmarks.tiny_model import write_model

NUM_SAMPLES, LENGTH, PROMPT_LENGTH, NUM_QUERY_TOKENS, BLOCK_LENGTH = 8, 512, 256, 26, 64
VOCABULARY = 32_768


def peak_gib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def samples() -> list:
    """The step's samples, all distilled."""
    from megatron_sd.records import TrainingSample

    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= PROMPT_LENGTH
    return [
        TrainingSample(
            ids=rng.integers(VOCABULARY, size=LENGTH),
            prompt_length=PROMPT_LENGTH,
            loss_mask=mask,
            rollout_logprobs=np.where(mask, -10.0, 0.0).astype(np.float32),
            query_positions=np.arange(PROMPT_LENGTH + 10, PROMPT_LENGTH + 10 + NUM_QUERY_TOKENS),
            advantages=np.float32(1.0 - index % 3) * mask,
            turns=np.zeros(len(mask), np.int64),
            group=0,
            group_has_spread=True,
            teacher_prompt_ids=tuple(rng.integers(VOCABULARY, size=BLOCK_LENGTH + PROMPT_LENGTH).tolist()),
        )
        for index in range(NUM_SAMPLES)
    ]


def ours(model: Path) -> float:
    """One update through the policy, under DeepSpeed ZeRO-3."""
    from megatron_sd.algorithm.distill_loss import TermWeights
    from megatron_sd.algorithm.packing.batches import pack
    from megatron_sd.building.policy import build_policy
    from megatron_sd.config.load import load
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import join_world

    required = {
        "run_dir": model / "run",
        "model.path": model,
        "data.train": "none",
        "retriever.corpus": "none",
    }
    chosen = {"model.dtype": "float32", "policy_loss.kl_weight": 0, "update.head_chunk_rows": 256}
    config = load([f"--{key}={value}" for key, value in (required | chosen).items()])
    policy = build_policy(config, Parallel.of(config.update, join_world()))
    (batch,) = pack(samples(), max_tokens=1 << 20, world_size=1, aggregation="token")
    before = peak_gib()
    for microbatch in batch:
        policy.accumulate(
            microbatch, batch.totals, TermWeights(policy=1.0, distill_spread=1.0, distill_no_spread=1.0)
        )
    return peak_gib() - before


def naive(model: Path) -> float:
    """The same losses from full logits, as the formulas are usually written."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    batch = samples()
    ids = torch.from_numpy(np.stack([sample.ids for sample in batch]))
    prompts = torch.tensor([sample.teacher_prompt_ids for sample in batch])
    teacher_ids = torch.cat([prompts, ids[:, PROMPT_LENGTH:]], dim=1)
    advantages = torch.tensor([sample.advantages[-1] for sample in batch])[:, None]
    before = peak_gib()
    student = torch.log_softmax(policy(ids).logits[:, :-1], -1)
    with torch.no_grad():
        teacher = torch.log_softmax(policy(teacher_ids).logits[:, BLOCK_LENGTH:-1], -1)
    chosen = student.gather(-1, ids[:, 1:, None])[..., 0]
    loss = -(advantages * torch.exp(chosen - chosen.detach()))[:, PROMPT_LENGTH - 1 :].mean()
    mixture = torch.logsumexp(torch.stack([student, teacher]), 0) - float(np.log(2))
    divergence = 0.5 * (
        (teacher.exp() * (teacher - mixture)).sum(-1) + (student.exp() * (student - mixture)).sum(-1)
    )
    queries = torch.from_numpy(batch[0].query_positions) - 1
    (loss + divergence[:, queries].mean()).backward()
    return peak_gib() - before


def main() -> None:
    """Measure and report; with --measure, be one of the two measured processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=("ours", "naive"))
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print({"ours": ours, "naive": naive}[arguments.measure](arguments.model))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), vocabulary=VOCABULARY, hidden=128, layers=2)
        growth = {}
        for side in ("ours", "naive"):
            command = [sys.executable, "-m", __spec__.name, "--measure", side, "--model", directory]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            growth[side] = float(finished.stdout.split()[-1])
    figures = {"ours": growth["ours"], "theirs": growth["naive"]}
    report(
        "memory",
        [Comparison(name="peak memory of an update", unit="GiB", against="naive", **figures)],
        arguments.json,
    )


if __name__ == "__main__":
    main()
