"""What an update really takes of a process's memory: grows of its resident set, from before the policy is
loaded.

Linux only. main's arguments: MODEL OUTPUT NUM_SAMPLES LENGTH [--key=value ...]
"""

from __future__ import annotations

import ctypes
import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.building.policy import build_critic, build_policy
from megatron_sd.config.load import load
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.world import join_world
from megatron_sd.records import Batch, Microbatch, TrainingSample, UpdateResult
from megatron_sd.training.critic.critic import Critic

BLOCK_TOKENS = 64
M_MMAP_THRESHOLD = -3  # of mallopt


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def samples(num: int, length: int, vocabulary: int) -> list[TrainingSample]:
    """Half prompt, half completion, one in twenty of it query tokens; all distilled."""
    rng = np.random.default_rng(0)
    start = length // 2
    mask = np.arange(length) >= start
    return [
        TrainingSample(
            ids=rng.integers(vocabulary, size=length),
            prompt_length=start,
            loss_mask=mask,
            rollout_logprobs=np.where(mask, -10.0, 0.0).astype(np.float32),
            query_positions=np.arange(start + 2, start + 2 + max(length // 20, 1)),
            advantages=np.float32(1.0 - index % 3) * mask,
            turns=np.zeros(len(mask), np.int64),
            group=0,
            group_has_spread=True,
            teacher_prompt_ids=tuple(rng.integers(vocabulary, size=BLOCK_TOKENS + start).tolist()),
        )
        for index in range(num)
    ]


def with_values_of(critic: Critic, microbatch: Microbatch) -> Microbatch:
    """What the critic is to learn takes the same room whatever it is."""
    values = critic.read(microbatch)["values"]
    return replace(microbatch, returns=values + 1.0, old_values=values)


def main(argv: list[str]) -> None:
    model, output, num, length, *options = argv
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16), "what is freed would not go back at once"
    world = join_world()
    required = {"run_dir": "none", "model.path": model, "data.train": "none", "retriever.corpus": "none"}
    config = load([*(f"--{key}={value}" for key, value in required.items()), *options])
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    gc.collect()
    before = resident_bytes("VmRSS")
    parallel = Parallel.of(config.update, world)
    policy, critic = build_policy(config, parallel), build_critic(config, parallel)
    found: dict[str, int] = {}

    def closes(moment: str) -> None:
        found[moment] = resident_bytes("VmHWM") - before
        reset_peak()

    def update(batch: Batch) -> UpdateResult:
        for microbatch in batch:
            weights = TermWeights(policy=1.0, distill_spread=1.0, distill_no_spread=1.0)
            policy.accumulate(microbatch, batch.totals, weights)
        closes("update")
        result = policy.step()
        closes("step")
        return result

    for _ in range(2):  # the first step allocates AdamW's moments
        batches = pack(
            samples(int(num), int(length), vocabulary),
            max_tokens=1 << 20,
            world_size=world.size,
            aggregation="token",
        )
        batch = batches[world.rank]
        reset_peak()
        if critic is None:
            update(batch)
            continue
        critic.learn(
            replace(batch, microbatches=tuple(with_values_of(critic, m) for m in batch)), update, step=0
        )
        closes("critic")
    Path(f"{output}.{world.rank}").write_text(json.dumps(found))
