"""Which nodes train, which sample, which search; layouts that cannot work are refused before a job queues
for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.cluster.job import Job, Program
from megatron_sd.config import Config
from megatron_sd.config.checks import check_layer_cuts, check_sequence_heads
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import UnknownArchitectureError, worker_layouts


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Where a run of `program` goes. Options that are not these are that program's own."""

    program: Program = "train"  # what is run
    cluster: Literal["local", "hosts", "slurm"] = "local"  # this machine, those of a hostfile, or SLURM's
    nodes: int = 1  # that train; 0 with retriever_nodes: serve the corpus alone
    rollout_nodes: int = 0  # that serve vLLM and do nothing else
    retriever_nodes: int = 0  # that serve the corpus and do nothing else
    gpus_per_node: int = 8  # 0: the ranks run on CPUs
    ranks_per_node: int | None = None  # None: one for each GPU that no vLLM server of the node has
    gpu: str = "h100"  # whose memory the ranks must fit (launch/planner/gpus.py)
    hostfile: str | None = None  # of cluster hosts: the nodes that train, with their slots
    remote_shell: str = "ssh -o BatchMode=yes"  # of cluster hosts: runs a command on a machine
    master_port: int = 29500  # of rank 0
    vllm_port: int = 8000  # of a rollout node's first server
    retriever_port: int = 8741  # of a retriever node
    max_attempts_without_progress: int = 3  # in a row, before the run is given up
    doctor: bool = True  # check the nodes before every attempt
    dry_run: bool = False  # write everything, start nothing
    setup: str | None = None  # a line of shell that each node runs first: modules, an environment
    partition: str | None = None  # this and the rest: of SLURM
    account: str | None = None  # of SLURM
    qos: str | None = None  # of SLURM
    time: str = "24:00:00"  # of one job
    grace_s: int = 600  # before the time is up, the ranks are told to save
    sbatch: tuple[str, ...] = ()  # further options of sbatch, such as --mem=0

    @property
    def num_nodes(self) -> int:
        """Of all kinds."""
        return self.nodes + self.rollout_nodes + self.retriever_nodes


def ranks_per_node(layout: LayoutConfig, config: Config) -> int:
    """Training ranks of a node: what is asked for, or one for each GPU that is not vLLM's, or one."""
    return layout.ranks_per_node or max(layout.gpus_per_node - gpus_of_vllm(config), 1)


def gpus_of_vllm(config: Config) -> int:
    """GPUs of a training node that the run's own vLLM servers have."""
    own = config.rollout.vllm
    is_beside = config.rollout.engine == "vllm" and own.placement == "process"
    return own.num_replicas * own.tensor_parallel_size if is_beside else 0


def servers_per_node(layout: LayoutConfig, config: Config) -> int:
    """vLLM servers of a rollout node: as many as its GPUs hold."""
    return max(layout.gpus_per_node, 1) // config.rollout.vllm.tensor_parallel_size


def check_layout(layout: LayoutConfig, job: Job, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Remarks on a layout that works. Raises ConfigError for one that cannot. Memory is the planner's."""
    config = job.config
    _check_numbers(layout)
    _check_servers_of_sft(layout, job)
    if job.samples:
        _check_nodes(layout, config)
    _check_gpus(layout, config)
    if job.samples and config.rollout.engine == "vllm":
        _check_heads(config, model)
    heads = model.get("num_attention_heads", 1)
    check_layer_cuts(config.update, model)
    check_sequence_heads(config.update, num_heads=heads, num_kv_heads=model.get("num_key_value_heads", heads))
    _check_batch(layout, job)
    if job.samples:
        _check_positions(config, model)
    return _remarks_on_rollouts(layout, config) if job.program == "train" else ()


def _check_numbers(layout: LayoutConfig) -> None:
    at_least_one = ("master_port", "vllm_port", "retriever_port", "max_attempts_without_progress", "grace_s")
    least = dict.fromkeys(at_least_one, 1) | dict.fromkeys(
        ("rollout_nodes", "retriever_nodes", "gpus_per_node"), 0
    )
    least["nodes"] = 0 if layout.retriever_nodes and not layout.rollout_nodes else 1
    for name, minimum in least.items():
        if getattr(layout, name) < minimum:
            raise ConfigError(f"{name}: found {getattr(layout, name)}, expected {minimum} or more")
    if layout.ranks_per_node is not None and layout.ranks_per_node < 1:
        raise ConfigError(f"ranks_per_node: found {layout.ranks_per_node}, expected 1 or more")
    if layout.cluster == "local" and layout.num_nodes > 1:
        raise ConfigError(
            f"nodes: found {layout.num_nodes} on cluster local, expected 1: set cluster to hosts or slurm"
        )
    if layout.cluster == "hosts" and layout.hostfile is None:
        raise ConfigError(
            "hostfile: found none with cluster hosts, expected a file with one line `NAME slots=N` a machine"
        )
    if layout.cluster != "slurm" and layout.rollout_nodes + layout.retriever_nodes:
        raise ConfigError(
            f"rollout_nodes, retriever_nodes: found {layout.rollout_nodes} and {layout.retriever_nodes} on"
            f" cluster {layout.cluster}, expected 0: start the servers there by `sd-search vllm serve` and"
            " `sd-search retriever serve`"
        )


def _check_servers_of_sft(layout: LayoutConfig, job: Job) -> None:
    if job.program == "sft" and layout.rollout_nodes:
        raise ConfigError(
            f"rollout_nodes: found {layout.rollout_nodes} with program sft, expected 0: its evaluation "
            "samples in the ranks (rollout.engine torch), beside them (vllm), or on servers that already run "
            "(rollout.vllm.urls)"
        )
    if not job.samples and layout.retriever_nodes:
        raise ConfigError(
            f"retriever_nodes: found {layout.retriever_nodes} with program sft and no eval, expected 0, "
            "since nobody searches; or an eval"
        )


def _check_nodes(layout: LayoutConfig, config: Config) -> None:
    own = config.rollout.vllm
    wants_servers = config.rollout.engine == "vllm" and own.placement == "server"
    if layout.rollout_nodes and not wants_servers:
        raise ConfigError(
            f"rollout_nodes: found {layout.rollout_nodes} with rollout.engine {config.rollout.engine} and"
            f" placement {own.placement}, expected --rollout.engine vllm --rollout.vllm.placement server"
        )
    if wants_servers and not (layout.rollout_nodes or own.urls):
        raise ConfigError(
            "rollout.vllm.placement: found server without rollout_nodes or urls, expected one of them"
        )
    if layout.retriever_nodes and not config.retriever.corpus:
        raise ConfigError(
            "retriever_nodes: found some without retriever.corpus, expected the corpus directory that they"
            " serve"
        )


def _check_gpus(layout: LayoutConfig, config: Config) -> None:
    size, beside = config.rollout.vllm.tensor_parallel_size, gpus_of_vllm(config)
    if layout.rollout_nodes and layout.gpus_per_node and layout.gpus_per_node % size:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size: found {size} on nodes of {layout.gpus_per_node} GPUs,"
            " expected a divisor: a server does not leave its node"
        )
    num_ranks = ranks_per_node(layout, config)
    if config.rollout.engine == "vllm" and config.rollout.vllm.placement == "colocated" and num_ranks % size:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size: found {size} with placement colocated on nodes of"
            f" {num_ranks} ranks, expected a divisor: that many ranks of one node share an engine"
        )
    if layout.gpus_per_node == 0:
        return
    if num_ranks + beside > layout.gpus_per_node:
        raise ConfigError(
            f"ranks_per_node: found {num_ranks} ranks and {beside} GPUs for vLLM on nodes of"
            f" {layout.gpus_per_node} GPUs, expected at most {layout.gpus_per_node} together: lower"
            " rollout.vllm.num_replicas or tensor_parallel_size"
        )
    devices = set(config.rollout.vllm.devices)
    if beside and (devices & set(range(num_ranks)) or not devices):
        expected = list(range(num_ranks, num_ranks + beside))
        raise ConfigError(
            f"rollout.vllm.devices: found {sorted(devices)}, expected GPUs that no rank has, such as"
            f" {expected}: the {num_ranks} ranks of a node take the first ones"
        )


def _check_heads(config: Config, model: Mapping[str, Any]) -> None:
    try:
        worker_layouts(model, tp_size=config.rollout.vllm.tensor_parallel_size, dtype=config.model.dtype)
    except UnknownArchitectureError:  # vLLM's own rules decide then
        return
    except ConfigError as error:
        raise ConfigError(f"rollout.vllm.tensor_parallel_size: {error}") from error


def _check_batch(layout: LayoutConfig, job: Job) -> None:
    world_size = layout.nodes * ranks_per_node(layout, job.config)
    key, size, unit = job.batch
    if size < world_size:
        raise ConfigError(
            f"{key}: found {size} for {world_size} ranks, expected at least one {unit} a rank: "
            "raise it, or take fewer nodes"
        )
    if world_size % job.config.update.ranks_per_batch:
        raise ConfigError(
            "update.sequence_parallel_size or tensor_parallel_size: found "
            f"{job.config.update.ranks_per_batch} for {world_size} ranks, expected a divisor of their number"
        )


def _check_positions(config: Config, model: Mapping[str, Any]) -> None:
    longest = config.rollout.max_rollout_tokens
    positions = model.get("max_position_embeddings", longest)
    if longest > positions:
        raise ConfigError(
            f"rollout.max_rollout_tokens: found {longest}, expected at most {positions}, "
            "the model's positions"
        )


def _remarks_on_rollouts(layout: LayoutConfig, config: Config) -> tuple[str, ...]:
    """Of a step that samples what it trains on."""
    rollout, world_size = config.rollout, layout.nodes * ranks_per_node(layout, config)
    remarks = []
    if rest := rollout.questions_per_step % world_size:
        remarks.append(
            f"rollout.questions_per_step {rollout.questions_per_step} is no multiple of {world_size} ranks:"
            f" {rest} of them roll out one question more, and the others wait"
        )
    if config.update.microbatch_tokens < rollout.max_rollout_tokens:
        remarks.append(
            f"update.max_microbatch_tokens {config.update.microbatch_tokens} is less than"
            f" rollout.max_rollout_tokens {rollout.max_rollout_tokens}: a rollout that is longer has a"
            " microbatch of its own, and needs its memory"
        )
    return tuple(remarks)
