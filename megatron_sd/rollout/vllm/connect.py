"""Where the vLLM of a run is: in servers started beside the ranks of a node, or running elsewhere, or in
the ranks themselves."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from megatron_sd.config import ModelConfig, RolloutConfig
from megatron_sd.distributed.collectives import together
from megatron_sd.distributed.lockstep import Lockstep
from megatron_sd.distributed.world import World, environment_of_others
from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.rollout.vllm.colocated_engine import ColocatedEngine
from megatron_sd.rollout.vllm.colocated_start import start_llm
from megatron_sd.rollout.vllm.memory import memory_share, worker_memory
from megatron_sd.rollout.vllm.options import (
    ServedModel,
    check_server,
    describe,
    read_description,
    server_arguments,
    server_environment,
)
from megatron_sd.rollout.vllm.request import ServedPolicy
from megatron_sd.rollout.vllm.server_process import ServerProcess, require_vllm
from megatron_sd.rollout.vllm.servers_engine import Servers, VllmEngine
from megatron_sd.search.tokens import TextCodec

LOCAL = "127.0.0.1"


def connect_vllm(
    model: ModelConfig, rollout: RolloutConfig, codec: TextCodec, world: World, *, log_dir: Path
) -> VllmEngine | ColocatedEngine:
    """This rank's engine: over the run's servers, or in this process. Collective; servers of its own are
    started by the first rank of each node, and their output is written to log_dir.

    Raises ConfigError when vLLM is not installed, and for engines that cannot work or serve another model,
    and RolloutError for one that ends early or is not there in time, on every rank.
    """
    own = rollout.vllm
    shape = ServedModel.read(model.path)
    if (own.placement == "server") != bool(own.urls):
        raise ConfigError(
            f"rollout.vllm.urls: found {list(own.urls)} with placement {own.placement!r}, expected addresses"
            " with placement server, and none with another"
        )
    policy = ServedPolicy(
        description=describe(shape, model),
        eos_ids=eos_ids(model.path, codec),
        vocabulary_size=shape.vocabulary_size,
        max_length=rollout.max_rollout_tokens,
    )
    if own.placement == "colocated":
        return _colocate(shape, model, rollout, codec, policy, world)
    starts_servers = own.placement == "process"
    processes: list[ServerProcess] = []
    publishes = world.local_rank == 0 if starts_servers else world.is_first
    if starts_servers and publishes:
        urls_by_rank = together(world, lambda: _start(shape, model, rollout, processes, log_dir))
    else:
        urls_by_rank = together(world, list)
    first, urls = own_servers(urls_by_rank, world.rank) if starts_servers else (0, list(own.urls))
    sharers = sharers_of(urls_by_rank, world.rank) if starts_servers else list(range(world.size))
    servers = Servers(
        urls=tuple(urls),
        processes=tuple(processes),
        publishes=publishes,
        publish_host=LOCAL if starts_servers else own.publish_host or socket.gethostname(),
        first_replica=first,
        num_replicas=sum(map(len, urls_by_rank)) if starts_servers else len(urls),
        sharer=sharers.index(world.rank),
        num_sharers=len(sharers),
    )
    timeouts = {"start_timeout_s": own.start_timeout_s, "request_timeout_s": own.request_timeout_s}
    engines: list[VllmEngine] = []
    together(world, lambda: engines.append(VllmEngine(servers, codec, policy, **timeouts)))
    return engines[0]


def _colocate(
    shape: ServedModel,
    model: ModelConfig,
    rollout: RolloutConfig,
    codec: TextCodec,
    policy: ServedPolicy,
    world: World,
) -> ColocatedEngine:
    """vLLM in this rank's process. What one rank alone runs into (memory, say) leaves the others waiting in
    vLLM's start."""
    require_vllm()
    check_server(shape, model, rollout, on_cpu=world.device.type == "cpu")
    lockstep = Lockstep(world, rollout.vllm.tensor_parallel_size, timeout_s=rollout.vllm.request_timeout_s)
    engines: list[ColocatedEngine] = []

    def start() -> None:
        try:
            llm = start_llm(model, rollout, world)
            engines.append(
                ColocatedEngine(llm, lockstep, codec, policy, world, timeout_s=rollout.vllm.request_timeout_s)
            )
        except Exception as error:  # whatever vLLM raises
            raise RolloutError(f"vLLM did not start in this rank: {type(error).__name__}: {error}") from error

    together(world, start)
    return engines[0]


def _start(
    shape: ServedModel,
    model: ModelConfig,
    rollout: RolloutConfig,
    processes: list[ServerProcess],
    log_dir: Path,
) -> list[str]:
    """Start this node's servers and wait until they serve; their addresses."""
    require_vllm()
    on_cpu = not torch.cuda.is_available()
    check_server(shape, model, rollout, on_cpu=on_cpu)
    inherited = environment_of_others()
    share = None if on_cpu else share_of_card(model, rollout)
    for replica in range(rollout.vllm.num_replicas):
        port = free_port()
        processes.append(
            ServerProcess(
                server_arguments(model, rollout, host=LOCAL, port=port, on_cpu=on_cpu, share=share),
                server_environment(inherited, rollout, replica=replica, on_cpu=on_cpu),
                url=f"http://{LOCAL}:{port}",
                log=log_dir / f"vllm_{replica}.log",
            )
        )
    for process in processes:
        process.wait_until_ready(rollout.vllm.start_timeout_s)
    return [process.url for process in processes]


def share_of_card(model: ModelConfig, rollout: RolloutConfig) -> float | None:
    """What vLLM may take of a GPU of this node beside the staged copy; the cards of a node are taken to be
    alike. None: the configured share, for a family whose weights are not staged. Raises ConfigError when a
    worker would not fit."""
    memory = worker_memory(read_description(model.path), model, rollout)
    if memory is None:
        return None
    device_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return memory_share(memory, rollout, device_bytes=device_bytes)


def own_servers(urls_by_rank: Sequence[Sequence[str]], rank: int) -> tuple[int, list[str]]:
    """The servers of a rank's node, which its first rank started, and the number of the first one among
    those of all nodes.

    >>> own_servers([["a", "b"], [], ["c", "d"], []], rank=3)
    (2, ['c', 'd'])
    """
    owner = max(number for number in range(rank + 1) if urls_by_rank[number])
    return sum(map(len, urls_by_rank[:owner])), list(urls_by_rank[owner])


def sharers_of(urls_by_rank: Sequence[Sequence[str]], rank: int) -> list[int]:
    """The ranks of a rank's node: from the one that started its servers to the next that did.

    >>> sharers_of([["a", "b"], [], ["c", "d"], []], rank=3)
    [2, 3]
    """
    owners = [number for number, urls in enumerate(urls_by_rank) if urls]
    first = max(number for number in owners if number <= rank)
    return list(range(first, min((number for number in owners if number > rank), default=len(urls_by_rank))))


def eos_ids(path: str, codec: TextCodec) -> frozenset[int]:
    """End-of-sequence ids of the tokenizer and of the model's generation settings, as the embedded engine
    has them."""
    try:
        settings = GenerationConfig.from_pretrained(path, local_files_only=True)
    except OSError:  # a model without generation_config.json
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, local_files_only=True))
    own = settings.eos_token_id
    return codec.eos_ids | (
        frozenset(own) if isinstance(own, list) else frozenset(() if own is None else (own,))
    )


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return probe.getsockname()[1]
