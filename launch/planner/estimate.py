"""`sd-search plan`: what a run will take, before it takes it: memory of a rank, publishing, tokens and seconds of a step.

    sd-search plan --model qwen2.5-72b --gpus 64
    sd-search plan --model models/Qwen2.5-0.5B --this-machine       what fits the memory that is free here

Memory is counted (launch/planner/memory.py); seconds follow from data sheets' peak figures and the efficiencies below, and say
which choices are out of the question. Without `--config` the run has gradient checkpointing, and vLLM on nodes of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster.layout import LayoutConfig, gpus_of_vllm, ranks_per_node, servers_per_node
from launch.options import split_options
from launch.planner.gpus import Gpu, find_gpu
from launch.planner.memory import (
    GIB,
    RESERVED_GIB,
    Part,
    Sizes,
    checkpoint_bytes,
    kv_bytes_per_token,
    peak,
    rank_memory,
)
from launch.planner.models import model_config
from launch.planner.this_machine import plan_here
from megatron_sd.config import Config
from megatron_sd.config.command_line import parse
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.balance import balance
from megatron_sd.resharding.layout import ShardLayout
from megatron_sd.resharding.names import UnknownArchitectureError, model_shape, whole_parameters, worker_layouts
from megatron_sd.resharding.plan import ITEM_BYTES, make_plan
from megatron_sd.rollout.vllm.memory import WorkerMemory, memory_share, worker_memory

# Tokens of a rollout's parts, beside observations of rollout.max_observation_tokens.
PROMPT_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 200, 90, 60
BLOCK_TOKENS = 350  # a hindsight block of five rollouts
UPDATE_EFFICIENCY = 0.40  # of peak products, ZeRO-3 over NVLink and InfiniBand
DECODE_EFFICIENCY = 0.60  # of peak memory bandwidth
DISK_GB_S = 2.0  # that a node reads from a shared file system
NETWORK_GB_S = 200.0  # of a node, one direction: eight links of 400 Gbit/s at half their peak
BLANKS = {
    "--run_dir": "none",
    "--data.train": "none",
    "--retriever.corpus": "none",
    "--model.gradient_checkpointing": "true",
    "--model.dtype": "bfloat16",
    "--rollout.engine": "vllm",
    "--rollout.vllm.placement": "server",
    "--rollout.vllm.urls": '["http://elsewhere:8000"]',
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """model: a directory, or a name such as qwen2.5-72b. Either `gpus` of a cluster, or this_machine: what fits here. Further
    options are the run's, as of `sd-search train`."""

    model: str
    gpus: int = 0
    this_machine: bool = False
    gpu: str = "h100"
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Of one optimiser step. publish_bytes: over all links. Seconds: expected, from peak figures."""

    rollout_tokens: int
    sampled_tokens: int
    teacher_tokens: int
    publish_bytes: float
    seconds: Mapping[str, float]


def main(argv: Sequence[str]) -> None:
    """Print the plan. Raises ConfigError for an unknown model or GPU."""
    own, rest = split_options(argv, PlanConfig)
    plan = parse(PlanConfig, own, "sd-search plan")
    if plan.this_machine:
        print(plan_here(plan.model, rest, model_config(plan.model)))
        return
    if plan.gpus < 1 or plan.gpus_per_node < 1:
        raise ConfigError(
            f"gpus, gpus_per_node: found {plan.gpus} and {plan.gpus_per_node}, expected 1 or more; or --this-machine"
        )
    per_node = min(plan.gpus, plan.gpus_per_node)
    if plan.gpus % per_node:
        raise ConfigError(f"gpus: found {plan.gpus}, expected a multiple of gpus_per_node {per_node}")
    layout = LayoutConfig(cluster="slurm", nodes=plan.gpus // per_node, gpus_per_node=per_node, gpu=plan.gpu)
    print(render_plan(layout, run_config(plan.model, rest), model_config(plan.model)))


def run_config(model: str, argv: Sequence[str]) -> Config:
    """The run that is planned: the options given, BLANKS where there is no configuration file, everything else at its default."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    blanks = {} if "--config" in given else BLANKS
    return load([*(f"{name}={value}" for name, value in blanks.items() if name not in given), *argv, f"--model.path={model}"])


def check_memory(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> tuple[str, ...]:
    """A remark when the fit is close, or when a model's family is not described. Raises ConfigError for a rank that does not fit
    its GPU, or an unknown GPU."""
    if layout.gpus_per_node == 0:
        return ()
    gpu = find_gpu(layout.gpu)
    try:
        shape = model_shape(model)
    except UnknownArchitectureError as error:
        return (f"memory is not checked: {error}",)
    parts = rank_memory(shape, config, world_size=layout.nodes * ranks_per_node(layout, config))
    needed, phase = peak(parts)
    needed_gib, free_gib = needed / GIB, gpu.memory_gib - RESERVED_GIB
    if needed_gib > free_gib:
        largest = sorted((p for p in parts if p.where == "device" and (not p.phases or phase in p.phases)), key=_size)[-3:]
        names = ", ".join(f"{part.name} {part.num_bytes / GIB:.1f}" for part in reversed(largest))
        raise ConfigError(
            f"memory: found {needed_gib:.1f} GiB a rank in phase {phase}, expected at most {free_gib:.1f} of a {gpu.name}; most "
            f"of it: {names}. More nodes, model.gradient_checkpointing, update.offload_optimizer or a smaller "
            "update.max_microbatch_tokens help; `sd-search plan` lists all"
        )
    check_servers(config, model, gpu)
    is_close = needed_gib > 0.9 * free_gib
    return (f"memory: {needed_gib:.1f} of {free_gib:.1f} GiB a rank, which is close",) if is_close else ()


def check_servers(config: Config, model: Mapping[str, Any], gpu: Gpu) -> WorkerMemory | None:
    """A worker of the run's vLLM servers; None where there is none. Raises ConfigError for one that does not fit its GPU with the
    copy that a publish stages."""
    if config.rollout.engine != "vllm" or config.rollout.vllm.placement == "colocated":
        return None
    memory = worker_memory(model, config.model, config.rollout)
    if memory is not None:
        memory_share(memory, config.rollout, device_bytes=gpu.memory_gib * GIB)
    return memory


def _size(part: Part) -> float:
    return part.num_bytes


def step_plan(layout: LayoutConfig, config: Config, model: Mapping[str, Any], gpu: Gpu) -> StepPlan:
    """Tokens, bytes and seconds of a step in which every rollout searches config.rollout.max_search_turns times."""
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
    num_receivers = min(-(-num_servers * tp_size // max(layout.gpus_per_node, 1)), layout.nodes)  # nodes; the bottleneck
    node_gb_s = NETWORK_GB_S if layout.nodes > 1 else gpu.link_gb_s
    seconds = {
        "rollout": _rollout_seconds(sampling, config, model, gpu),
        **_update_seconds(plan, layout, config, model),
        "publish": moved / (num_receivers * node_gb_s * 1e9),
    }
    return dataclasses.replace(plan, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """What one server has to do: rollouts, tokens sampled and in all of each, GPUs."""

    rows: float
    sampled: int
    length: int
    tp_size: int


def _rollout_seconds(work: _Sampling, config: Config, model: Mapping[str, Any], gpu: Gpu) -> float:
    """Prompts and observations are read at the speed of products; a token reads the weights, and the keys and values so far."""
    shape, item = model_shape(model), ITEM_BYTES[config.model.dtype]
    total, most = Sizes.of(shape).total, config.rollout.max_concurrent_sequences
    cached = min(work.rows, most) * work.length / 2 * kv_bytes_per_token(shape, item)
    a_token = (item * total + cached) / work.tp_size / (gpu.memory_tb_s * 1e12 * DECODE_EFFICIENCY)
    reading = 2 * total * work.rows * work.length / (work.tp_size * gpu.tflops * 1e12 * UPDATE_EFFICIENCY)
    return max(work.rows / most, 1.0) * work.sampled * a_token + reading


def _update_seconds(plan: StepPlan, layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> dict[str, float]:
    """Products of the student (forward and backward, and again under checkpointing), the start policy and the teacher; and what
    ZeRO-3 gathers for them."""
    gpu, world_size = find_gpu(layout.gpu), layout.nodes * ranks_per_node(layout, config)
    total, item = Sizes.of(model_shape(model)).total, ITEM_BYTES[config.model.dtype]
    passes = 3 + config.model.gradient_checkpointing + (config.policy_loss.kl_weight > 0.0)
    products = 2 * total * (passes * plan.rollout_tokens + plan.teacher_tokens)
    positions = plan.rollout_tokens + plan.teacher_tokens
    num_batches = world_size // config.update.ranks_per_batch
    num_microbatches = max(-(-positions // (config.update.max_microbatch_tokens * num_batches)), 1)
    num_gathers = 2 + (config.policy_loss.kl_weight > 0.0) + 2 * (plan.teacher_tokens > 0)
    gathered = num_microbatches * num_gathers * item * total * (1 - 1 / world_size)
    link = gpu.link_gb_s if layout.nodes == 1 else NETWORK_GB_S  # each node receives all that its ranks do not have
    return {
        "update: products": products / (world_size * gpu.tflops * 1e12 * UPDATE_EFFICIENCY),
        "update: gathering parameters": gathered / (link * 1e9),
    }


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


def render_plan(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> str:
    """The tables that are printed."""
    gpu, shape, rollout = find_gpu(layout.gpu), model_shape(model), config.rollout
    world_size = layout.nodes * ranks_per_node(layout, config)
    parts = rank_memory(shape, config, world_size=world_size)
    needed, phase = peak(parts)
    verdict = "fits" if needed / GIB <= gpu.memory_gib - RESERVED_GIB else "DOES NOT FIT"
    step = step_plan(layout, config, model, gpu)
    kv = kv_bytes_per_token(shape, ITEM_BYTES[config.model.dtype])
    disk = checkpoint_bytes(shape, config) / 1e9
    lines = [
        f"{Sizes.of(shape).total / 1e9:.2f} G parameters, {config.model.dtype}, ZeRO-{config.update.zero_stage}, {world_size} "
        f"training ranks on {layout.nodes} nodes, {gpu.name}; rollouts by {rollout.engine}",
        f"\nmemory of a rank{'':<26}GiB   when",
        *(f"  {p.name:<36}{p.num_bytes / GIB:>8.2f}   {_when(p)}" for p in parts if p.num_bytes),
        f"  {'worst moment':<36}{needed / GIB:>8.2f}   {phase}; {verdict} in {gpu.memory_gib:g} less {RESERVED_GIB:g} reserved",
        *_server_lines(config, model, gpu),
        f"\nkeys and values   {kv / 2**20:.3f} MiB a token, {kv * rollout.max_rollout_tokens / GIB:.2f} GiB a rollout of "
        f"{rollout.max_rollout_tokens} tokens",
        f"checkpoint        {disk:.0f} GB each with its model, {disk * (config.checkpoint.keep + 1):.0f} GB for the "
        f"{config.checkpoint.keep} kept and one being written",
        f"loading           {_loading(layout, config, model)}",
        f"publish           {step.publish_bytes / 1e9:.1f} GB a step",
        f"tokens of a step  {step.rollout_tokens / 1e6:.2f} M in rollouts, of them {step.sampled_tokens / 1e6:.2f} M sampled; "
        f"{step.teacher_tokens / 1e6:.2f} M read by the teacher",
        f"\nexpected seconds of a step ({UPDATE_EFFICIENCY:.0%} of {gpu.tflops:g} TFLOP/s, {DECODE_EFFICIENCY:.0%} of "
        f"{gpu.memory_tb_s:g} TB/s, {NETWORK_GB_S:g} GB/s a node)",
        *(f"  {name:<36}{seconds:>8.1f}" for name, seconds in step.seconds.items()),
    ]
    return "\n".join(lines)


def _loading(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> str:
    """What a node's ranks read of the model's files: under ZeRO-3 each its own elements; else all of them, which they share."""
    item = ITEM_BYTES.get(model.get("dtype") or model.get("torch_dtype") or "bfloat16", ITEM_BYTES["float32"])
    total = item * Sizes.of(model_shape(model)).total / 1e9
    reads_shards = config.update.zero_stage == 3 and config.update.tensor_parallel_size == 1
    a_node = total / layout.nodes if reads_shards else total
    whose = "each rank its own elements" if reads_shards else "every rank loads the whole model, of pages that they share"
    return f"{a_node:.1f} GB read a node ({whose}), {a_node / DISK_GB_S:.1f} s at {DISK_GB_S:g} GB/s"


def _when(part: Part) -> str:
    return (", ".join(part.phases) or "always") + ("" if part.where == "device" else ", in host memory")


def _server_lines(config: Config, model: Mapping[str, Any], gpu: Gpu) -> list[str]:
    """A worker of a vLLM server, and what is left to it for keys and values."""
    try:
        memory = check_servers(config, model, gpu)
    except ConfigError as error:
        return [f"\na vLLM worker DOES NOT FIT: {error}"]
    if memory is None:
        return []
    share = memory_share(memory, config.rollout, device_bytes=gpu.memory_gib * GIB)
    return [
        f"\na vLLM worker: weights {memory.weights / GIB:.2f} GiB, staged by a publish {memory.staged / GIB:.2f}, "
        f"for vLLM {share:.3f} of the card"
    ]
