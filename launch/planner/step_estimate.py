"""Tokens, bytes and seconds of a step, from data sheets' peak figures and stated efficiencies: pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.cluster.layout import LayoutConfig, gpus_of_vllm, ranks_per_node, servers_per_node
from launch.planner.gpus import Gpu, find_gpu
from launch.planner.memory import (
    GIB,
    RESERVED_GIB,
    Sizes,
    critic_elements,
    kv_bytes_per_token,
    peak,
    rank_memory,
    teacher_sizes,
)
from megatron_sd.algorithm.refinements import refinements
from megatron_sd.config import Config
from megatron_sd.resharding.balance import balance
from megatron_sd.resharding.layout import ShardLayout
from megatron_sd.resharding.names import model_shape, whole_parameters, worker_layouts
from megatron_sd.resharding.plan import ITEM_BYTES, make_plan

# Tokens of a rollout's parts, beside observations of rollout.max_observation_tokens.
PROMPT_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 200, 90, 60
BLOCK_TOKENS = 350  # a hindsight block of five rollouts
UPDATE_EFFICIENCY = 0.40  # of peak products, ZeRO-3 over NVLink and InfiniBand
DECODE_EFFICIENCY = 0.60  # of peak memory bandwidth
NETWORK_GB_S = 200.0  # of a node, one direction: eight links of 400 Gbit/s at half their peak


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Of one optimiser step. publish_bytes: over all links. Seconds: expected, from peak figures."""

    rollout_tokens: int
    sampled_tokens: int
    teacher_tokens: int
    publish_bytes: float
    seconds: Mapping[str, float]


def step_plan(layout: LayoutConfig, config: Config, model: Mapping[str, Any], gpu: Gpu) -> StepPlan:
    """Tokens, bytes and seconds of a step in which every rollout searches config.rollout.max_search_turns
    times."""
    rollout, distils = config.rollout, config.distill.block != "none"
    num_rollouts = rollout.questions_per_step * rollout.group_size
    sampled = rollout.max_search_turns * TURN_TOKENS + ANSWER_TOKENS
    observed = rollout.max_search_turns * rollout.max_observation_tokens
    length = min(PROMPT_TOKENS + sampled + observed, rollout.max_rollout_tokens)
    shared = rollout.questions_per_step * (PROMPT_TOKENS + BLOCK_TOKENS)
    num_servers, tp_size, moved = _publish(layout, config, model)
    plan = StepPlan(
        rollout_tokens=num_rollouts * length,
        sampled_tokens=num_rollouts * sampled,
        teacher_tokens=num_rollouts * length + shared if distils else 0,
        publish_bytes=moved,
        seconds={},
    )
    rows = num_rollouts / num_servers
    sampling = _Sampling(rows=rows, sampled=sampled, length=length, tp_size=tp_size)
    num_receivers = min(
        -(-num_servers * tp_size // max(layout.gpus_per_node, 1)), layout.nodes
    )  # nodes; the bottleneck
    node_gb_s = NETWORK_GB_S if layout.nodes > 1 else gpu.link_gb_s
    seconds = {
        "rollout": _rollout_seconds(sampling, config, model, gpu),
        **update_seconds(
            layout,
            config,
            model,
            rollout_tokens=plan.rollout_tokens,
            teacher_tokens=plan.teacher_tokens,
        ),
        "publish": moved / (num_receivers * node_gb_s * 1e9),
    }
    return dataclasses.replace(plan, seconds=seconds)


def whole_step_seconds(seconds: Mapping[str, float], *, max_lag: int) -> float:
    """Of StepPlan.seconds: sampling, then the update; the longer of the two where sampling is a step ahead. Then
    the publish."""
    update = seconds["update: products"] + seconds["update: communication, exposed"]
    rollout = seconds["rollout"]
    return (max(rollout, update) if max_lag else rollout + update) + seconds["publish"]


def best_split(
    layout: LayoutConfig, config: Config, model: Mapping[str, Any], gpu: Gpu
) -> tuple[LayoutConfig, float]:
    """The layout's nodes dealt to training and to sampling as a step is shortest, and its seconds; of equal ones
    the layout's own. Deals in which the ranks do not fit their GPUs are left out."""
    total, shape = layout.nodes + layout.rollout_nodes, model_shape(model)
    deals = [dataclasses.replace(layout, nodes=n, rollout_nodes=total - n) for n in range(1, total)]
    free = (gpu.memory_gib - RESERVED_GIB) * GIB

    def fits(deal: LayoutConfig) -> bool:
        world_size = deal.nodes * ranks_per_node(deal, config)
        shares = world_size % config.update.ranks_per_batch == 0
        return shares and peak(rank_memory(shape, config, world_size=world_size))[0] <= free

    def seconds(deal: LayoutConfig) -> float:
        return whole_step_seconds(step_plan(deal, config, model, gpu).seconds, max_lag=config.rollout.max_lag)

    found = [(seconds(deal), deal != layout, deal) for deal in deals if deal == layout or fits(deal)]
    shortest, _, best = min(found, key=lambda one: one[:2])
    return best, shortest


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """What one server has to do: rollouts, tokens sampled and in all of each, GPUs."""

    rows: float
    sampled: int
    length: int
    tp_size: int


def _rollout_seconds(work: _Sampling, config: Config, model: Mapping[str, Any], gpu: Gpu) -> float:
    """Prompts and observations are read at the speed of products; a token reads the weights, and the keys
    and values so far."""
    shape, item = model_shape(model), ITEM_BYTES[config.model.dtype]
    total, most = Sizes.of(shape).total, config.rollout.max_concurrent_sequences
    cached = min(work.rows, most) * work.length / 2 * kv_bytes_per_token(shape, item)
    a_token = (item * total + cached) / work.tp_size / (gpu.memory_tb_s * 1e12 * DECODE_EFFICIENCY)
    reading = 2 * total * work.rows * work.length / (work.tp_size * gpu.tflops * 1e12 * UPDATE_EFFICIENCY)
    return max(work.rows / most, 1.0) * work.sampled * a_token + reading


def tokens_of_full_microbatches(layout: LayoutConfig, config: Config) -> int:
    """Positions of one full microbatch on every rank, or on every group of ranks that share one."""
    num_batches = layout.nodes * ranks_per_node(layout, config) // config.update.ranks_per_batch
    return config.update.microbatch_tokens * num_batches


def update_seconds(
    layout: LayoutConfig,
    config: Config,
    model: Mapping[str, Any],
    *,
    rollout_tokens: int,
    teacher_tokens: int,
) -> dict[str, float]:
    """Products of the student (forward and backward, and again under checkpointing), the start policy, the
    teacher and a critic (which also reads the step once before it); and what ZeRO-3 gathers and reduces for
    them, hidden behind the products or not. Tokens: what student and teacher read in a step, on all ranks."""
    gpu, world_size = find_gpu(layout.gpu), layout.nodes * ranks_per_node(layout, config)
    shape = model_shape(model)
    sizes, teachers = Sizes.of(shape), teacher_sizes(shape, config).total
    epochs, reads_anew = config.update.epochs, _reads_anew(config)
    passes = epochs * (3 + config.model.gradient_checkpointing + (config.policy_loss.kl_weight > 0.0))
    critic = critic_elements(shape, config)
    critic_passes = 1 + epochs * (3 + config.model.gradient_checkpointing)
    read = sizes.total * (passes + reads_anew) + critic * critic_passes
    products = 2 * (read * rollout_tokens + epochs * teachers * teacher_tokens)
    product_seconds = products / (world_size * gpu.tflops * 1e12 * UPDATE_EFFICIENCY)
    positions = rollout_tokens + teacher_tokens
    num_batches = world_size // config.update.ranks_per_batch
    num_microbatches = max(-(-positions // (config.update.microbatch_tokens * num_batches)), 1)
    # a forward and a backward gather what they need, and a backward reduces what it made
    num_gathers = epochs * (2 + (config.policy_loss.kl_weight > 0.0)) + reads_anew
    moved = sizes.total * (num_gathers + epochs) + critic * (1 + 3 * epochs)
    moved += 2 * epochs * teachers * (teacher_tokens > 0)
    num_bytes = num_microbatches * ITEM_BYTES[config.model.dtype] * moved * (1 - 1 / world_size)
    # each node receives all that its ranks do not have
    link_gb_s = gpu.link_gb_s if layout.nodes == 1 else NETWORK_GB_S
    communication = num_bytes / (link_gb_s * 1e9)
    # nothing computes before the first layer is there; beyond that, what takes longer is waited for
    exposed = max(communication - product_seconds, communication / sizes.num_layers)
    return {
        "update: products": product_seconds,
        "update: communication, exposed": exposed,
        "update: communication, hidden": communication - exposed,
    }


def _reads_anew(config: Config) -> bool:
    """The step's batches are read once more, before its first update."""
    return bool(refinements(config.policy_loss, config.advantage, config.update, config.critic))


def _publish(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> tuple[int, int, float]:
    """Servers of the run, the GPUs of one, and the bytes of a publish to all."""
    own, dtype = config.rollout.vllm, config.model.dtype
    world_size = layout.nodes * ranks_per_node(layout, config)
    if config.rollout.engine == "torch":
        return world_size, 1, float(ITEM_BYTES[dtype] * Sizes.of(model_shape(model)).total * world_size)
    beside = layout.nodes * own.num_replicas if gpus_of_vllm(config) else 0
    if own.placement == "colocated":
        beside = world_size // own.tensor_parallel_size
    num_servers = beside or layout.rollout_nodes * servers_per_node(layout, config) or max(len(own.urls), 1)
    source = ShardLayout(parameters=whole_parameters(model, dtype=dtype), world_size=world_size)
    workers = worker_layouts(model, tp_size=own.tensor_parallel_size, dtype=dtype)
    moved = balance(make_plan(source, workers, num_replicas=num_servers)).moved
    return num_servers, own.tensor_parallel_size, float(moved)
