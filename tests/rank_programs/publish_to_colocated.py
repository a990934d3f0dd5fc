"""Trains, publishes and samples in one process per rank: vLLM inside the trainer's ranks.

python -m tests.rank_programs.publish_to_colocated OUTPUT MODEL TP_SIZE PUBLISH
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import torch

from megatron_sd.building.trainer import choose_publisher
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import end_process, join_world, leave_world
from megatron_sd.errors import RolloutError
from megatron_sd.rollout.engine import Delivery, awake
from megatron_sd.rollout.vllm.connect import connect_vllm
from megatron_sd.search.tokens import load_codec
from megatron_sd.training.publisher import ShardPublisher
from tests.rank_programs.publish_shards import take_step
from tests.rank_programs.publish_to_vllm import whole_model
from tests.training.fakes import make_config, make_policy
from tests.vllm.servers import BLOCK, ask, gap, limits, prompt, serve


def main(output: str, model: str, tp_size: str, publish: str) -> None:
    world = join_world()
    rollout = limits(int(tp_size), placement="colocated", publish=publish, request_timeout_s=20.0)
    config = make_config(Path(model), rollout=rollout, optimizer={"learning_rate": 0.05})
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    engine = connect_vllm(config.model, rollout, load_codec(model), world, log_dir=Path(model))
    policy = make_policy(config, world)
    publisher = choose_publisher(policy, config, engine)
    found = {
        "rank": world.rank,
        "sharded": isinstance(publisher, ShardPublisher),
        "fresh": [],
        "stale": [],
        "versions": [],
    }
    found["replicas"] = engine.num_replicas

    # Ranks have different numbers of requests, of different lengths: they share engines all the same.
    requests = [
        ask(f"r{n}", prompt(n, world.rank), seed=n) for n in (5, BLOCK, 3 * BLOCK + 2)[: 3 - world.rank]
    ]
    requests = [
        *requests,
        ask("greedy", prompt(9), temperature=0.0),
        ask("stops", prompt(50, 7), stop=("a", "e", "t")),
    ]
    publisher.publish(policy, engine, 7)
    for version in (8, 9):
        with awake(engine):
            stale = serve(engine, *requests)
        take_step(policy)
        publisher.publish(policy, engine, version)
        with awake(engine):
            fresh, again = serve(engine, *requests), serve(engine, *requests)
        trained = whole_model(policy, model)
        found["fresh"].append(gap(trained, requests, fresh))
        found["stale"].append(gap(trained, requests, stale))
        found["versions"].append(sorted({completion.policy_version for completion in fresh}))
        found["repeats"] = [c.ids for c in fresh] == [c.ids for c in again]
        found["greedy"] = fresh[-2].ids
    found["finishes"] = [c.finish for c in fresh]
    found["random_numbers_untouched"] = torch.equal(before, torch.random.get_rng_state())
    found["refusals"] = refusals(engine)
    found["failed"] = failed_update(engine)
    with awake(engine):
        found["aborted"] = aborted(engine) if world.is_first else "other"
        found["left"] = left_by_a_cancelled_task(engine) if world.is_first else 0
        found["after"] = gap(trained, requests, serve(engine, *requests))
    everybody = gather_objects(world, found)
    if world.is_first:
        Path(output).write_text(json.dumps(everybody))
    leave_world()
    end_process(0)


def refusals(engine) -> list[str]:
    """What is said to callers who do things at the wrong time."""
    said = []
    for action in (
        lambda: serve(engine, ask()),
        lambda: engine.load_bucket([]),
        lambda: engine.finish_update(1),
    ):
        try:
            action()
        except RolloutError as error:
            said.append(str(error))
    return said


def failed_update(engine) -> str:
    """An update whose trainer cannot be found; the engine samples on from what it had."""
    engine.begin_update()
    error = engine.start_receiving(Delivery("127.0.0.1:1", number=1, policy_version=10)).exception()
    engine.cancel_update()
    return type(error).__name__


def aborted(engine) -> str:
    """A rollout that is released while it is sampled."""

    async def run() -> str:
        asked = asyncio.ensure_future(engine.generate(ask("gone", prompt(20), max_new_tokens=300)))
        await asyncio.sleep(0.02)
        engine.release("gone")
        with contextlib.suppress(asyncio.CancelledError):
            await asked
            return "answered"
        return "cancelled"

    return asyncio.run(run())


def left_by_a_cancelled_task(engine) -> int:
    """Requests that the engine still works at for a rollout whose task was cancelled, as a stop request
    does."""

    async def run() -> int:
        asked = asyncio.ensure_future(engine.generate(ask("stopped", prompt(20), max_new_tokens=300)))
        await asyncio.sleep(0.02)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        engine.release("stopped")
        return len(engine._asked)

    return asyncio.run(run())


if __name__ == "__main__":
    main(*sys.argv[1:])
