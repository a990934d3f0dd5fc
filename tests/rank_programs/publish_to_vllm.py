"""Trains and publishes to running vLLM servers from the ranks of a launcher; every rank compares what it
samples with its policy.

python -m tests.rank_programs.publish_to_vllm OUTPUT '[{"model": DIR, "url": URL, "tp_size": 1, "publish":
"shards"}, ...]'
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_sd.building.trainer import choose_publisher
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import World, end_process, join_world, leave_world
from megatron_sd.rollout.vllm.connect import connect_vllm
from megatron_sd.search.tokens import load_codec
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import BUCKET_BYTES, ShardPublisher, gathered_buckets
from tests.rank_programs.publish_shards import take_step
from tests.training.fakes import make_config, make_policy
from tests.vllm.servers import BLOCK, ask, gap, limits, prompt, serve


def play(world: World, model: str, url: str, tp_size: int, publish: str) -> dict[str, object]:
    """Two publishes, each after an optimiser step."""
    rollout = limits(tp_size, placement="server", urls=(url,), publish=publish)
    config = dataclasses.replace(make_config(Path(model), optimizer={"learning_rate": 0.05}), rollout=rollout)
    engine = connect_vllm(config.model, rollout, load_codec(model), world, log_dir=Path(model))
    policy = make_policy(config, world)
    publisher = choose_publisher(policy, config, engine)
    requests = [ask(f"r{n}", prompt(n, world.rank), seed=n) for n in (5, BLOCK, 3 * BLOCK + 2)]
    found = {"sharded": isinstance(publisher, ShardPublisher), "fresh": [], "stale": [], "versions": []}
    publisher.publish(policy, engine, 7)
    for version in (8, 9):
        stale = serve(engine, *requests)
        gather_objects(world, None)  # nobody samples any more
        take_step(policy)
        publisher.publish(policy, engine, version)
        fresh, trained = serve(engine, *requests), whole_model(policy, model)
        found["fresh"].append(gap(trained, requests, fresh))
        found["stale"].append(gap(trained, requests, stale))
        found["versions"].append(sorted({completion.policy_version for completion in fresh}))
    return found


def whole_model(policy: Policy, directory: str):
    """The trained weights in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    for bucket in gathered_buckets(policy.named_parameters(), BUCKET_BYTES):
        for name, value in bucket:
            parameters[name].data.copy_(value)
    return model


def main(output: str, scenes: str) -> None:
    world = join_world()
    found = [gather_objects(world, play(world, **scene)) for scene in json.loads(scenes)]
    if world.is_first:
        Path(output).write_text(json.dumps(found))
    leave_world()
    end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
