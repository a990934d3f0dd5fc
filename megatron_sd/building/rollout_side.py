"""What samples rollouts, put together: engine, environment, retriever and the rollouter over them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RolloutConfig
from megatron_sd.distributed.world import World, lone_world
from megatron_sd.errors import ConfigError
from megatron_sd.observability.progress import Work
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.retriever import Retriever
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.vllm.colocated_engine import ColocatedEngine
from megatron_sd.rollout.vllm.connect import connect_vllm
from megatron_sd.rollout.vllm.servers_engine import VllmEngine
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import TextCodec, load_codec
from megatron_sd.search.tools import open_tools

disable_progress_bar()  # of weight loading: one bar for every model and rank says nothing


Engine = TorchEngine | VllmEngine | ColocatedEngine


@dataclass(frozen=True, kw_only=True)
class RolloutSide:
    """Everything that samples rollouts; training and evaluation share it."""

    engine: Engine
    environment: Environment
    retriever: Retriever
    rollouter: Rollouter
    work: Work

    def close(self) -> None:
        """End what the engine started."""
        self.engine.close()


def build_rollout_side(
    model: ModelConfig,
    protocol: ProtocolConfig,
    rollout: RolloutConfig,
    retriever: RetrieverConfig,
    *,
    seed: int,
    output: Path,
    world: World | None = None,
    on_demand: bool = False,
) -> RolloutSide:
    """Engine, environment, retriever and the rollouter over them. output: of the run, for the engine's
    logs. world: None is this process alone, on the first CUDA device or the CPU. on_demand: the embedded
    engine need not load weights, since a policy will be published to it.

    Raises DataError for a missing model or corpus, RetrievalError for servers that cannot be reached,
    ConfigError for an engine that cannot be had as configured.
    """
    world = world or lone_world()
    texts = build_protocol(protocol)
    codec = load_codec(model.path, texts.chat)
    environment = Environment(codec, texts, rollout)
    passages = open_retriever(retriever)
    engine = build_engine(model, rollout, codec, world, output=output, on_demand=on_demand)
    work = Work(sys.stderr if world.is_first else None)
    rollouter = Rollouter(
        engine,
        passages,
        environment,
        top_k=retriever.top_k,
        seed=seed,
        world=world,
        work=work,
        tools=open_tools(
            environment.protocol.tools, passages if isinstance(passages, CorpusRetriever) else None
        ),
    )
    return RolloutSide(
        engine=engine, environment=environment, retriever=passages, rollouter=rollouter, work=work
    )


def _torch_engine(
    model: ModelConfig, rollout: RolloutConfig, codec: TextCodec, world: World, *, on_demand: bool
) -> TorchEngine:
    options = {"attention": "eager" if model.attention == "eager" else "sdpa", "on_demand": on_demand}
    weights = load_model(model.path, dtype=getattr(torch, model.dtype), device=world.device, **options)
    engine = TorchEngine(weights, codec, max_rows=rollout.max_concurrent_sequences)
    if rollout.max_rollout_tokens > engine.max_length:
        raise ConfigError(
            f"rollout.max_rollout_tokens is {rollout.max_rollout_tokens}, expected at most"
            f" {engine.max_length}, the positions of the model in {model.path}"
        )
    return engine


def build_engine(
    model: ModelConfig,
    rollout: RolloutConfig,
    codec: TextCodec,
    world: World,
    *,
    output: Path,
    on_demand: bool = False,
) -> Engine:
    """The engine that rollout.engine names; collective. Raises ConfigError for one that cannot be had as
    configured."""
    if rollout.engine == "torch":
        return _torch_engine(model, rollout, codec, world, on_demand=on_demand)
    return connect_vllm(model, rollout, codec, world, log_dir=output / "vllm")
