"""Takes steps of a critic alone on the samples of tests/training/fakes.py, for one and for several ranks.

python -m tests.rank_programs.critic_steps '[{"model": DIR, "output": FILE, ...}, ...]'  (class CriticOrder)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.algorithm.refinements import Read, Reading, with_values
from megatron_sd.building.policy import build_critic
from megatron_sd.config import AdvantageConfig, Config, CriticConfig
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.world import World, join_world, leave_world
from megatron_sd.records import Batch, UpdateResult
from megatron_sd.training.critic.critic import Critic
from megatron_sd.training.publisher import gathered_buckets
from megatron_sd.training.state.tensor_file import write_tensors
from tests.training.fakes import make_config, make_samples


@dataclass(frozen=True, kw_only=True)
class CriticOrder:
    """config: of make_config; critic: of CriticConfig. load, save: directories of a checkpoint's shards."""

    model: str
    output: str = ""
    steps: int = 3
    config: dict[str, Any] = field(default_factory=dict)
    critic: dict[str, Any] = field(default_factory=dict)
    only: list[int] | None = None  # of the samples
    load: str | None = None
    save: str | None = None
    first: int = 0  # the step that it begins with


def configured(order: CriticOrder) -> Config:
    config = make_config(Path(order.model), **order.config)
    critic = CriticConfig(**{"learning_rate": 1e-3, "warmup_steps": 2, **order.critic})
    return replace(config, advantage=AdvantageConfig(estimator="gae"), critic=critic)


def parameters_of(critic: Critic) -> dict[str, torch.Tensor]:
    buckets = gathered_buckets(critic.model.named_parameters(), 20_000)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def batch_of(order: CriticOrder, world: World) -> Batch:
    samples = make_samples(16)
    samples = samples if order.only is None else [samples[number] for number in order.only]
    packed = pack(samples, max_tokens=60, world_size=world.size, aggregation="token")
    return packed[world.rank]


def read_anew(critic: Critic, batch: Batch, world: World) -> Batch:
    """The batch with returns and old values of these weights."""
    nothing = torch.zeros(0).numpy()
    readings = [Reading(nothing, nothing, nothing, **critic.read(microbatch)) for microbatch in batch]
    refined = with_values(
        [Read(*pair) for pair in zip(batch.microbatches, readings, strict=True)],
        lambda own: gather_objects(world, own),
        config=CriticConfig(lam=0.9),
        kl_weight=0.0,
    )
    critic.compare(refined)
    return replace(batch, microbatches=tuple(refined))


def take_critic_steps(order: CriticOrder, world: World) -> dict[str, Any]:
    """The order's outcome on this rank."""
    config = configured(order)
    critic = build_critic(config, Parallel.of(config.update, world))
    start, history, updates = parameters_of(critic), [], []
    if order.load is not None:
        critic.read_state(Path(order.load))
        critic.go_on()

    def update(batch: Batch) -> UpdateResult:
        updates.append(len(batch.microbatches))
        return UpdateResult(grad_norm=1.0, learning_rate=2.0, metrics={"loss/policy": 3.0})

    for step in range(order.first, order.steps):
        result = critic.learn(read_anew(critic, batch_of(order, world), world), update, step)
        history.append(result.scalars)
    if order.save is not None:
        Path(order.save).mkdir(exist_ok=True)
        for name, file in critic.files().items():
            write_tensors(Path(order.save) / name, *file)
    return {
        "parameters": parameters_of(critic),
        "start": start,
        "history": history,
        "updates": len(updates),
        "version": critic.version,
        "rows": [len(microbatch.row_index) for microbatch in batch_of(order, world)],
    }


def run(orders: str) -> None:
    """orders: JSON objects, each with the keys of a CriticOrder."""
    world = join_world()
    for fields in json.loads(orders):
        order = CriticOrder(**fields)
        torch.save(take_critic_steps(order, world), f"{order.output}.{world.rank}")
    leave_world()
