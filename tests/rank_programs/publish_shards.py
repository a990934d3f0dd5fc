"""Publishes shards from the ranks that call it to worker processes, and writes what came of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import World, join_world, leave_world
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.layout import WorkerId
from megatron_sd.resharding.staging import num_staged
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import ShardPublisher, gathered_buckets
from tests.resharding.fakes import WorkerGroup, peak_bytes
from tests.training.fakes import make_config, make_policy, make_samples
from tests.training.tensor_parallel_oracle import worker_tensors


@dataclass(frozen=True, kw_only=True)
class Scene:
    """publish: fields of PublishConfig. fault: an action of a worker process in the second of three
    versions, for worker 0."""

    model: str
    output: str
    tp_size: int
    num_replicas: int
    publish: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    zero_stage: int = 3
    learning_rate: float = 1e-3
    fault: str | None = None


def make_publisher(scene: Scene, world: World) -> tuple[Policy, ShardPublisher]:
    """The policy of the scene and its publisher."""
    config = make_config(
        Path(scene.model),
        model={"dtype": scene.dtype},
        update={"zero_stage": scene.zero_stage},
        optimizer={"learning_rate": scene.learning_rate},
    )
    config = dataclasses.replace(
        config, publish=dataclasses.replace(config.publish, **({"attempts": 1} | scene.publish))
    )
    policy = make_policy(config, world)
    return policy, ShardPublisher(
        policy,
        config.publish,
        dtype=config.model.dtype,
        tp_size=scene.tp_size,
        num_replicas=scene.num_replicas,
    )


def take_step(policy: Policy) -> None:
    """One update on samples of tests/training/fakes.py."""
    batches = pack(make_samples(4), max_tokens=300, world_size=policy.world.size, aggregation="token")
    batch = batches[policy.world.rank]
    for microbatch in batch:
        policy.accumulate(
            microbatch, batch.totals, TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
        )
    policy.step()


def expected_tensors(policy: Policy, worker: WorkerId) -> dict[str, torch.Tensor]:
    """A worker's tensors, cut from gathered full parameters. Collective."""
    full = {
        name: tensor.clone()
        for bucket in gathered_buckets(policy.named_parameters(), 1 << 20)
        for name, tensor in bucket
    }
    dtype = next(iter(full.values())).dtype
    arrays = {name: tensor.float().numpy() for name, tensor in full.items()}
    cut = worker_tensors(arrays, policy.model.config.to_dict(), worker.tp_rank, worker.tp_size)
    return {name: torch.tensor(value).to(dtype) for name, value in cut.items()}


def differences(policy: Policy, group: WorkerGroup, plan_workers: list[WorkerId]) -> list[str]:
    """What workers of this rank hold that the policy does not; collective."""
    lines = []
    for number, worker in enumerate(plan_workers):
        expected = expected_tensors(policy, worker)
        found = group.workers[number].tensors() if group.workers else expected
        same = found.keys() == expected.keys() and all(
            torch.equal(found[name], value) for name, value in expected.items()
        )
        lines += [] if same else [str(worker)]
    return lines


def play(scene: Scene, world: World, group: WorkerGroup) -> dict[str, Any]:
    """Three versions with a step between them; the outcome on this rank."""
    policy, publisher = make_publisher(scene, world)
    workers = [
        WorkerId(replica=r, tp_rank=t, tp_size=scene.tp_size)
        for r in range(scene.num_replicas)
        for t in range(scene.tp_size)
    ]
    group.join(publisher)
    outcome: dict[str, Any] = {"differences": [], "errors": [], "sent": [], "received": [], "shares": []}
    group.action = "receive_measured"
    outcome["peak"] = peak_bytes(lambda: publisher.publish(policy, group, 0))
    outcome["worker_peaks"], group.action = group.received, "receive"
    for version in (1, 2):
        take_step(policy)
        if scene.fault and version == 1:
            outcome["errors"] += fail_and_recover(scene.fault, policy, publisher, group)
        publisher.publish(policy, group, version)
        outcome["differences"] += differences(policy, group, workers)
        outcome["sent"].append(publisher.num_bytes)
        outcome["received"].append(group.received)
        outcome["shares"].append(publisher.changed_share)
    outcome["log"], outcome["numel"] = group.log, sum(spec.numel for spec in publisher.plan.source.parameters)
    outcome["staged"] = [
        num_staged(layout) * publisher.plan.item_bytes for layout in publisher.plan.workers
    ] * scene.num_replicas
    outcome["largest_copy"] = (
        4 * max(spec.numel for spec in publisher.plan.source.parameters)
        if scene.publish.get("checksums")
        else 0
    )
    source = publisher.plan.source
    own = [source.owned(spec.numel, world.rank) for spec in source.parameters]
    outcome["owned"] = sum(stop - start for start, stop in own) * publisher.plan.item_bytes
    outcome["shards"] = [layout.numel for layout in publisher.plan.workers] * scene.num_replicas
    publisher.close()
    return outcome


def fail_and_recover(fault: str, policy: Policy, publisher: ShardPublisher, group: WorkerGroup) -> list[str]:
    """Publish version 1 with a fault in worker 0; the error and what the last worker then holds. Worker 0
    is back afterwards."""
    before = [worker.tensors() for worker in group.workers[1:]]
    if group.workers:
        group.workers[0].call(fault)
    lines = []
    try:
        publisher.publish(policy, group, 1)
    except ReshardError as error:
        lines.append(str(error))
    for tensors, worker in zip(before, group.workers[1:]):
        after = worker.tensors()
        kept = all(torch.equal(after[name], value) for name, value in tensors.items())
        lines.append(f"version {worker.call('version')} {'kept' if kept else 'changed'}")
    if group.workers:
        group.restart(0, publisher)
    gather_objects(policy.world, None)  # nobody publishes again before the worker is back
    return lines


def run(work: str) -> None:
    """work: JSON objects, each with the keys of a Scene."""
    world = join_world()
    scenes = [Scene(**fields) for fields in json.loads(work)]
    num_workers = max(scene.tp_size * scene.num_replicas for scene in scenes)
    all_workers = WorkerGroup(num_workers if world.is_first else 0)
    for scene in scenes:
        group = all_workers.first(scene.tp_size * scene.num_replicas)
        torch.save(play(scene, world, group), f"{scene.output}.{world.rank}")
        all_workers.workers[: len(group.workers)] = group.workers  # some may have been restarted
    all_workers.stop()
    leave_world()
