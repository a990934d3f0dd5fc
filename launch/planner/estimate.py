"""`sd-search plan`: what a run will take, before it takes it: memory of a rank, publishing, tokens and
seconds of a step.

    sd-search plan --model qwen2.5-72b --gpus 64
    sd-search plan --model models/Qwen2.5-0.5B --this-machine       what fits the memory that is free here
    sd-search plan --program sft --model qwen2.5-7b --gpus 8        a warm-up, before there are episodes

Memory is counted (memory.py). Seconds follow from data sheets' peak figures and stated efficiencies
(step_plan.py), and say which choices are out of the question. Without `--config` the run has gradient
checkpointing, and `train` has vLLM on nodes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cluster.job import PLANNED_JOBS, Job, Program
from launch.cluster.layout import LayoutConfig, ranks_per_node
from launch.options import split_options
from launch.planner import this_machine
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
from launch.planner.microbatch import largest_microbatch, settle_on_nodes
from launch.planner.models import model_config
from launch.planner.step_estimate import (
    DECODE_EFFICIENCY,
    NETWORK_GB_S,
    UPDATE_EFFICIENCY,
    best_split,
    step_plan,
    tokens_of_full_microbatches,
    update_seconds,
    whole_step_seconds,
)
from megatron_sd.config import Config
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import DecoderSizes, UnknownArchitectureError, model_shape
from megatron_sd.resharding.plan import ITEM_BYTES
from megatron_sd.rollout.vllm.memory import WorkerMemory, memory_share, worker_memory

DISK_GB_S = 2.0  # that a node reads from a shared file system
LEAST_GAIN = 0.05  # of a step, for which another deal of the nodes is worth a word
Blanks = Mapping[Program, Mapping[str, str]]  # by program: options of a run without a configuration file
BLANKS: Blanks = {
    "train": {
        "--run_dir": "none",
        "--data.train": "none",
        "--retriever.corpus": "none",
        "--model.gradient_checkpointing": "true",
        "--model.dtype": "bfloat16",
        "--rollout.engine": "vllm",
        "--rollout.vllm.placement": "server",
        "--rollout.vllm.urls": '["http://elsewhere:8000"]',
    },
    "sft": {
        "--run_dir": "none",
        "--episodes": "none",
        "--model.gradient_checkpointing": "true",
        "--model.dtype": "bfloat16",
    },
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """model: a directory, or a name such as qwen2.5-72b. Either `gpus` of a cluster, or this_machine: what
    fits here. Further options are the run's, as of `sd-search train`, or of `sd-search sft`."""

    model: str
    program: Program = "train"  # what would be run
    gpus: int = 0  # of the cluster
    this_machine: bool = False  # plan for it instead
    gpu: str = "h100"  # their kind
    gpus_per_node: int = 8  # at most


def main(argv: Sequence[str]) -> None:
    """Print the plan. Raises ConfigError for an unknown model or GPU."""
    own, rest = split_options(argv, PlanConfig)
    plan = parse(PlanConfig, own, "sd-search plan")
    if plan.this_machine:
        job = planned_job(plan, rest, this_machine.BLANKS)
        print(this_machine.plan_here(job, model_config(plan.model)))
        return
    if plan.gpus < 1 or plan.gpus_per_node < 1:
        raise ConfigError(
            f"gpus, gpus_per_node: found {plan.gpus} and {plan.gpus_per_node}, expected 1 or more; or"
            " --this-machine"
        )
    per_node = min(plan.gpus, plan.gpus_per_node)
    if plan.gpus % per_node:
        raise ConfigError(f"gpus: found {plan.gpus}, expected a multiple of gpus_per_node {per_node}")
    layout = LayoutConfig(cluster="slurm", nodes=plan.gpus // per_node, gpus_per_node=per_node, gpu=plan.gpu)
    job = planned_job(plan, rest, BLANKS)
    if settled := settle_on_nodes(layout, job.config):
        job = planned_job(plan, [*rest, *settled], BLANKS)
    print(render_plan(layout, job, model_config(plan.model)))


def planned_job(plan: PlanConfig, argv: Sequence[str], blanks: Blanks) -> Job:
    """The run that is planned: the options given, blanks where there is no configuration file, defaults for
    the rest. Raises ConfigError."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    own = {} if "--config" in given else blanks[plan.program]
    words = [f"{name}={value}" for name, value in own.items() if name not in given]
    return PLANNED_JOBS[plan.program]([*words, *argv, f"--model.path={plan.model}"])


def check_memory(layout: LayoutConfig, job: Job, model: Mapping[str, Any]) -> tuple[str, ...]:
    """A remark when the fit is close, or when a model's family is not described. Raises ConfigError for a
    rank that does not fit its GPU, or an unknown GPU."""
    if layout.gpus_per_node == 0:
        return ()
    config, gpu = job.config, find_gpu(layout.gpu)
    try:
        shape = model_shape(model)
        parts = rank_memory(shape, config, world_size=layout.nodes * ranks_per_node(layout, config))
    except UnknownArchitectureError as error:
        return (f"memory is not checked: {error}",)
    needed, phase = peak(parts)
    needed_gib, free_gib = needed / GIB, gpu.memory_gib - RESERVED_GIB
    if needed_gib > free_gib:
        largest = sorted(
            (p for p in parts if p.where == "device" and (not p.phases or phase in p.phases)), key=_size
        )[-3:]
        names = ", ".join(f"{part.name} {part.num_bytes / GIB:.1f}" for part in reversed(largest))
        raise ConfigError(
            f"memory: found {needed_gib:.1f} GiB a rank in phase {phase}, expected at most {free_gib:.1f} of"
            f" a {gpu.name}; most of it: {names}. More nodes, model.gradient_checkpointing,"
            " update.offload_optimizer or a smaller update.max_microbatch_tokens help; `sd-search plan`"
            " lists all"
        )
    if job.samples:
        check_servers(config, model, gpu)
    is_close = needed_gib > 0.9 * free_gib
    return (f"memory: {needed_gib:.1f} of {free_gib:.1f} GiB a rank, which is close",) if is_close else ()


def check_servers(config: Config, model: Mapping[str, Any], gpu: Gpu) -> WorkerMemory | None:
    """A worker of the run's vLLM servers; None where there is none. Raises ConfigError for one that does
    not fit its GPU with the copy that a publish stages."""
    if config.rollout.engine != "vllm" or config.rollout.vllm.placement == "colocated":
        return None
    memory = worker_memory(model, config.model, config.rollout)
    if memory is not None:
        memory_share(memory, config.rollout, device_bytes=gpu.memory_gib * GIB)
    return memory


def _size(part: Part) -> float:
    return part.num_bytes


def render_plan(layout: LayoutConfig, job: Job, model: Mapping[str, Any]) -> str:
    """The tables that are printed."""
    config, gpu, shape = job.config, find_gpu(layout.gpu), model_shape(model)
    world_size = layout.nodes * ranks_per_node(layout, config)
    disk = checkpoint_bytes(shape, config) / 1e9
    kept = [
        (
            f"checkpoint        {disk:.0f} GB each with its model, {disk * (config.checkpoint.keep + 1):.0f}"
            f" GB for the {config.checkpoint.keep} kept and one being written"
        ),
        f"loading           {_loading(layout, config, model)}",
    ]
    lines = [
        (
            f"{Sizes.of(shape).total / 1e9:.2f} G parameters, {config.model.dtype},"
            f" ZeRO-{config.update.zero_stage}, {world_size} training ranks on {layout.nodes} nodes,"
            f" {gpu.name}; {_who_samples(job)}"
        ),
        *_memory_lines(rank_memory(shape, config, world_size=world_size), gpu),
        _microbatch_line(shape, config, world_size, gpu),
        *(_server_lines(config, model, gpu) if job.samples else ()),
        *(_cache_lines(config, model) if job.samples else ("",)),
        *kept,
        *(_step_lines if job.program == "train" else _episode_lines)(layout, config, model),
    ]
    return "\n".join(lines)


def _who_samples(job: Job) -> str:
    if job.program == "train":
        return f"rollouts by {job.config.rollout.engine}"
    if not job.samples:
        return "episodes: nobody samples"
    return f"episodes, and an evaluation by {job.config.rollout.engine}"


def _memory_lines(parts: Sequence[Part], gpu: Gpu) -> list[str]:
    needed, phase = peak(parts)
    verdict = "fits" if needed / GIB <= gpu.memory_gib - RESERVED_GIB else "DOES NOT FIT"
    return [
        f"\nmemory of a rank{'':<26}GiB   when",
        *(f"  {p.name:<36}{p.num_bytes / GIB:>8.2f}   {_when(p)}" for p in parts if p.num_bytes),
        (
            f"  {'worst moment':<36}{needed / GIB:>8.2f}   {phase}; {verdict} in {gpu.memory_gib:g} less"
            f" {RESERVED_GIB:g} reserved"
        ),
    ]


def _microbatch_line(shape: DecoderSizes, config: Config, world_size: int, gpu: Gpu) -> str:
    free = (gpu.memory_gib - RESERVED_GIB) * GIB
    largest = largest_microbatch(shape, config, world_size, free=free, on_cpu=False)
    return (
        f"  update.max_microbatch_tokens {config.update.microbatch_tokens:,}; the largest power of two that"
        f" fits: {'none' if largest is None else f'{largest:,}'}"
    )


def _cache_lines(config: Config, model: Mapping[str, Any]) -> list[str]:
    kv = kv_bytes_per_token(model_shape(model), ITEM_BYTES[config.model.dtype])
    longest = config.rollout.max_rollout_tokens
    of_rollout = f"{kv * longest / GIB:.2f} GiB a rollout of {longest} tokens"
    return [f"\nkeys and values   {kv / 2**20:.3f} MiB a token, {of_rollout}"]


def _step_lines(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> list[str]:
    """Of a step that samples rollouts, trains on them and publishes."""
    gpu = find_gpu(layout.gpu)
    step = step_plan(layout, config, model, gpu)
    return [
        f"publish           {step.publish_bytes / 1e9:.1f} GB a step",
        (
            f"tokens of a step  {step.rollout_tokens / 1e6:.2f} M in rollouts, of them"
            f" {step.sampled_tokens / 1e6:.2f} M sampled; {step.teacher_tokens / 1e6:.2f} M read by the"
            " teacher"
        ),
        (
            f"\nexpected seconds of a step ({UPDATE_EFFICIENCY:.0%} of {gpu.tflops:g} TFLOP/s,"
            f" {DECODE_EFFICIENCY:.0%} of {gpu.memory_tb_s:g} TB/s, {NETWORK_GB_S:g} GB/s a node)"
        ),
        *_second_lines(step.seconds),
        *_balance_lines(layout, config, model, step.seconds),
    ]


def _balance_lines(
    layout: LayoutConfig, config: Config, model: Mapping[str, Any], seconds: Mapping[str, float]
) -> list[str]:
    """How long a whole step takes, and with which other deal of the nodes it would be shorter."""
    own = whole_step_seconds(seconds, max_lag=config.rollout.max_lag)
    order = "side by side" if config.rollout.max_lag else "one after the other"
    lines = [f"  {'a step, rollout and update ' + order:<48}{own:>8.1f}"]
    if not layout.rollout_nodes:
        return lines
    best, shortest = best_split(layout, config, model, find_gpu(layout.gpu))
    if shortest < (1 - LEAST_GAIN) * own:
        return [
            *lines,
            f"  with nodes {best.nodes} and rollout_nodes {best.rollout_nodes} instead: {shortest:.1f}",
        ]
    return [
        *lines,
        f"  nodes {layout.nodes}, rollout_nodes {layout.rollout_nodes}: no other deal is a twentieth shorter",
    ]


def _episode_lines(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> list[str]:
    """Of a warm-up: how long its episodes are is known when they are selected."""
    gpu, tokens = find_gpu(layout.gpu), tokens_of_full_microbatches(layout, config)
    return [
        (
            f"\nexpected seconds of {tokens / 1e6:.2f} M tokens of episodes, a full microbatch on every rank "
            f"({UPDATE_EFFICIENCY:.0%} of {gpu.tflops:g} TFLOP/s, {NETWORK_GB_S:g} GB/s a node)"
        ),
        *_second_lines(update_seconds(layout, config, model, rollout_tokens=tokens, teacher_tokens=0)),
    ]


def _second_lines(seconds: Mapping[str, float]) -> list[str]:
    return [f"  {name:<36}{value:>8.1f}" for name, value in seconds.items()]


def _loading(layout: LayoutConfig, config: Config, model: Mapping[str, Any]) -> str:
    """What a node's ranks read of the model's files: under ZeRO-3 each its own elements; else all of them,
    which they share."""
    item = ITEM_BYTES.get(model.get("dtype") or model.get("torch_dtype") or "bfloat16", ITEM_BYTES["float32"])
    total = item * Sizes.of(model_shape(model)).total / 1e9
    reads_shards = config.update.zero_stage == 3 and config.update.tensor_parallel_size == 1
    a_node = total / layout.nodes if reads_shards else total
    whose = (
        "each rank its own elements"
        if reads_shards
        else "every rank loads the whole model, of pages that they share"
    )
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
        f"\na vLLM worker: weights {memory.weights / GIB:.2f} GiB, staged by a publish"
        f" {memory.staged / GIB:.2f}, for vLLM {share:.3f} of the card"
    ]
