"""Publishing a real model from two ZeRO-3 ranks to vLLM: each worker's shard, against whole parameters
gathered and loaded.

    python -m benchmarks.rollout.publish_real MODEL_DIR [--tp 1 2] [--rounds 3] [--json FILE]

float32 on both sides. Every round moves all weights a little, publishes them by both ways in turn, and
after each samples a few completions, whose log-probabilities are compared with those of transformers on the
gathered weights. Seconds are of `publish`, from every rank's call to the last one's return. MiB are what
crosses from one process to another: of shards counted as they are sent, of the other way reckoned. Run it
where vLLM is installed (make .venv-vllm/ready).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.baseline import Comparison, report

NUM_RANKS = 2
WAYS = ("shards", "gather")
NUM_REQUESTS, NUM_NEW = 4, 24
SHIFT = 0.02  # of a weight's size, each round: other weights, and still a model
MARK = "FIGURES "

Sampled = list[tuple[tuple[int, ...], Any]]  # prompt ids and completion


def run_here(model_dir: str, tp_size: int, rounds: int, output: Path) -> None:
    """One rank: rank 0 prints seconds and MiB by way, and the largest gaps."""
    from megatron_sd.building.policy import build_policy
    from megatron_sd.building.rollout_side import build_engine
    from megatron_sd.config import VllmConfig
    from megatron_sd.config.load import load
    from megatron_sd.distributed.collectives import gather_objects, sum_floats
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import end_process, join_world, leave_world
    from megatron_sd.search.tokens import load_codec
    from megatron_sd.training.publisher import GatherPublisher, ShardPublisher

    world = join_world()
    own = {"run_dir": output, "data.train": "none", "retriever.corpus": "none", "model.path": model_dir}
    config = load([f"--{key}={value}" for key, value in (own | {"model.dtype": "float32"}).items()])
    served = VllmConfig(tensor_parallel_size=tp_size, kv_cache_gib=0.5, publish="shards")
    rollout = dataclasses.replace(
        config.rollout, engine="vllm", vllm=served, max_rollout_tokens=1024, max_concurrent_sequences=8
    )
    codec = load_codec(model_dir)
    engine = build_engine(config.model, rollout, codec, world, output=output)
    policy = build_policy(config, Parallel.of(config.update, world))
    publishers: dict[str, Any] = {
        "shards": ShardPublisher(
            policy, config.publish, dtype="float32", tp_size=tp_size, num_replicas=engine.num_replicas
        ),
        "gather": GatherPublisher(),
    }
    model_mib = sum(p.ds_numel for _, p in policy.named_parameters()) * 4 / 2**20
    judge = Judge(policy, model_dir)
    found: dict[str, Any] = {way: {"seconds": [], "gap": [], "stale": []} for way in WAYS}
    for version in range(1, 2 * rounds + 3):  # the first of each way warms up
        way = WAYS[version % 2]
        stale = sample(engine, codec, version) if version > 1 else []
        move_weights(policy, version)
        gather_objects(world, None)
        started = time.perf_counter()
        publishers[way].publish(policy, engine, version)
        gather_objects(world, None)
        found[way]["seconds"].append(time.perf_counter() - started)
        for name, gap in zip(("gap", "stale"), judge.gaps(sample(engine, codec, version), stale)):
            found[way][name].append(gap)
    sent_mib = sum_floats(world, [publishers["shards"].num_bytes])[0] / 2**20
    # gathered: each rank gets what the others have; loaded: each worker gets all of it
    gathered_mib = model_mib * (world.size - 1 + tp_size * engine.num_replicas)
    found["shards"]["mib"], found["gather"]["mib"] = sent_mib, gathered_mib
    if world.is_first:
        print("\n" + MARK + json.dumps(found), flush=True)
    engine.close()
    leave_world()
    end_process(0)


@torch.no_grad()
def move_weights(policy: Any, seed: int) -> None:
    """Other weights on every rank's shards, as an optimiser step would leave them."""
    noise = torch.Generator().manual_seed(policy.world.size * seed + policy.world.rank)
    for _, parameter in policy.named_parameters():
        shard = parameter.ds_tensor
        shard.add_(torch.randn(shard.shape, generator=noise) * shard.abs(), alpha=SHIFT)


def sample(engine: Any, codec: Any, seed: int) -> Sampled:
    """(prompt ids, completion) of a few prompts."""
    from megatron_sd.rollout.engine import GenerationRequest

    requests = [
        GenerationRequest(
            session=f"{seed}/{n}",
            prompt_ids=tuple(codec.encode(f"def solve_{n}(numbers):\n    # returns the ")),
            max_new_tokens=NUM_NEW,
            temperature=1.0,
            seed=seed + n,
            stop=(),
        )
        for n in range(NUM_REQUESTS)
    ]

    async def serve() -> list[Any]:
        completions = await asyncio.gather(*(engine.generate(request) for request in requests))
        for request in requests:
            engine.release(request.session)
        return completions

    return [(request.prompt_ids, done) for request, done in zip(requests, asyncio.run(serve()), strict=True)]


class Judge:
    """The policy's weights in transformers, on rank 0."""

    def __init__(self, policy: Any, model_dir: str):
        from transformers import AutoModelForCausalLM

        self._policy = policy
        self._model = None
        if policy.world.is_first:
            self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.no_grad()
    def gaps(self, *samples: Sampled) -> list[float]:
        """Nats between the engine's log-probabilities and those of the policy's weights as they are now, the
        largest of each sample. All ranks gather; other ranks than 0 give 0."""
        from megatron_sd.training.publisher import BUCKET_BYTES, gathered_buckets

        parameters = dict(self._model.named_parameters()) if self._model else {}
        for bucket in gathered_buckets(self._policy.named_parameters(), BUCKET_BYTES):
            for name, value in bucket if parameters else ():
                parameters[name].copy_(value)
        return [
            max([0.0, *map(self._gap, *zip(*sampled, strict=True))]) if sampled else 0.0
            for sampled in samples
        ]

    def _gap(self, prompt_ids: tuple[int, ...], completion: Any) -> float:
        if self._model is None:
            return 0.0
        logits = self._model(torch.tensor([[*prompt_ids, *completion.ids]])).logits[
            0, len(prompt_ids) - 1 : -1
        ]
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        return (own - torch.tensor(completion.logprobs)).abs().max().item()


def measure(model_dir: str, tp_size: int, rounds: int) -> dict[str, Any]:
    """What rank 0 found."""
    from launch.local import free_port

    launcher = ["deepspeed.launcher.runner", "--num_gpus", str(NUM_RANKS), "--master_port", str(free_port())]
    with tempfile.TemporaryDirectory() as directory:
        own = [model_dir, "--tp", str(tp_size), "--rounds", str(rounds), "--here", directory]
        command = [sys.executable, "-m", *launcher, "--no_local_rank", "--module", __spec__.name, *own]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}  # of this program, which runs elsewhere
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=directory
        )
    lines = [line.partition(MARK)[2] for line in finished.stdout.splitlines()]
    found = [json.loads(line) for line in lines if line]
    if len(found) != 1:
        raise SystemExit(f"the ranks did not come to their end:\n{finished.stdout}{finished.stderr}")
    return found[0]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=lambda path: str(Path(path).resolve()))
    parser.add_argument(
        "--tp", nargs="+", type=int, default=[1, 2], help="tensor-parallel sizes of the server"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", type=Path, help="of one rank, started by this program: where it writes")
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    if arguments.model is None:
        print("not measured: it needs the directory of a pretrained model")
        return
    if arguments.here is not None:
        run_here(arguments.model, arguments.tp[0], arguments.rounds, arguments.here)
    comparisons = []
    for tp_size in arguments.tp:
        found = measure(arguments.model, tp_size, arguments.rounds)
        ours, theirs = (found[way] for way in WAYS)
        for way in WAYS:
            gaps = f"largest gap {max(found[way]['gap']):.1e} nats, before the publish {min(found[way]['stale'][1:]):.2g}"
            print(f"TP {tp_size}, {way:>6}: {found[way]['mib']:.0f} MiB, {gaps}", flush=True)
        seconds = [statistics.median(own["seconds"][1:]) for own in (ours, theirs)]
        comparisons += [
            Comparison(
                name=f"TP {tp_size}, publish", ours=seconds[0], theirs=seconds[1], unit="s", against="gather"
            ),
            Comparison(
                name=f"TP {tp_size}, handed out",
                ours=ours["mib"],
                theirs=theirs["mib"],
                unit="MiB",
                against="gather",
            ),
        ]
    report("publish_real", comparisons, arguments.json)


if __name__ == "__main__":
    main()
