"""Takes update steps on the samples of tests/training/fakes.py and writes what came of them, for one and
for several ranks.

    python -m tests.rank_programs.update_steps '[{"model": DIR, "output": FILE, ...}, ...]'     (keys: class Order)
"""

from __future__ import annotations

import json
import resource
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.distributed.world import World, join_world, leave_world
from megatron_sd.errors import MegatronSdError
from megatron_sd.records import Batch, Layout
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import gathered_buckets
from megatron_sd.training.state import checkpoint
from megatron_sd.training.state.checkpoint import Checkpoints
from megatron_sd.training.state.tensor_file import write_tensors
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController
from tests.training.fakes import make_config, make_policy, make_samples
from tests.training.same_steps import moments_of


@dataclass(frozen=True, kw_only=True)
class Order:
    """config: of make_config. poison: {step: rank} whose rollout log-probabilities are NaN in that step."""

    model: str
    output: str = ""
    steps: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 16
    one_prompt_a_group: bool = False
    only: list[int] | None = None  # of the samples
    max_tokens: int = 150
    poison: dict[str, int] = field(default_factory=dict)
    checkpoint: str | None = None
    save: bool = True  # at the end
    file_bytes: int | None = None  # of the checkpoint's model files
    full_disk_rank: int | None = None  # may write no file beyond 10 kB when the checkpoint is saved
    reverse: bool = False


def full_parameters(policy: Policy) -> dict[str, torch.Tensor]:
    buckets = gathered_buckets(policy.named_parameters(), 20_000)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def own_moments(policy: Policy) -> dict[str, tuple[int, torch.Tensor]]:
    """This rank's elements of AdamW's first moments: where they begin in the flat parameter, and they."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rank_00000.safetensors"
        write_tensors(path, *policy.trained_state().file())
        return moments_of(path)


def batch_of(
    order: Order, world: World, aggregation: str, *, sharers: int = 1, layout: Layout = "padded"
) -> Batch:
    samples = make_samples(order.num_samples, one_prompt_a_group=order.one_prompt_a_group)
    samples = samples[::-1] if order.reverse else samples
    samples = samples if order.only is None else [samples[i] for i in order.only]
    size, number = world.size // sharers, world.rank // sharers
    options = {"max_tokens": order.max_tokens, "aggregation": aggregation, "layout": layout}
    return pack(samples, world_size=size, **options)[number]


def take_steps(order: Order, world: World) -> dict[str, Any]:
    """The order's outcome on this rank."""
    config = make_config(Path(order.model), **order.config)
    policy, alpha = make_policy(config, world), AlphaController(config.distill, config.policy_loss.weight)
    embeddings, tokens_read = policy.model.get_input_embeddings(), []
    embeddings.register_forward_hook(
        lambda _module, arguments, _output: tokens_read.append(arguments[0].numel())
    )
    checkpoints = (
        Checkpoints(Path(order.checkpoint), config, world, corpus_version="c") if order.checkpoint else None
    )
    state = (checkpoints.load(policy) if checkpoints else None) or {"step": 0, "alpha": alpha.state()}
    alpha.load_state(state["alpha"])
    sharing = {"sharers": config.update.ranks_per_batch, "layout": config.layout}
    own_batch = partial(batch_of, order, world, config.policy_loss.aggregation, **sharing)
    history, errors, start = [], [], full_parameters(policy)
    for step in range(state["step"], order.steps):
        batch = own_batch()
        if order.poison.get(str(step)) == world.rank:
            batch.microbatches[0].rollout_logprobs[:] = float("nan")
        for weights in alpha.passes(step):
            for microbatch in batch:
                policy.accumulate(microbatch, batch.totals, weights)
            alpha.observe(policy)
        try:
            update = policy.step()
            history.append({"grad_norm": update.grad_norm, **update.metrics, **alpha.metrics()})
        except MegatronSdError as error:
            errors.append(f"{type(error).__name__}: {error}")
    if order.file_bytes:
        checkpoint.LEAST_FILE_BYTES = checkpoint.MODEL_FILE_BYTES = order.file_bytes
    if checkpoints and order.save:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == order.full_disk_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            checkpoints.save(policy, step=order.steps, state={"alpha": alpha.state()}, wait=False)
            checkpoints.settle()
        except MegatronSdError as error:
            errors.append(f"{type(error).__name__}: {error}")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {
        "parameters": full_parameters(policy),
        "start": start,
        "moments": own_moments(policy),
        "history": history,
        "errors": errors,
        "version": policy.version,
        "rows": [len(microbatch.row_index) for microbatch in own_batch()],
        "query_rows": [len(microbatch.query_rows) for microbatch in own_batch()],
        "tokens_read": sum(tokens_read),  # by the student and by a live teacher
    }


def run(orders: str) -> None:
    """orders: JSON objects, each with the keys of an Order."""
    world = join_world()
    for fields in json.loads(orders):
        order = Order(**fields)
        torch.save(take_steps(order, world), f"{order.output}.{world.rank}")
    leave_world()
