"""Tiny model directories that vLLM can serve on a CPU, their servers, and what the trainer's side says of
the same tokens."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_sd.config import ModelConfig, RolloutConfig, VllmConfig
from megatron_sd.ops.native import cpu_library
from megatron_sd.rollout.engine import Completion, GenerationRequest
from megatron_sd.rollout.vllm.connect import eos_ids, free_port
from megatron_sd.rollout.vllm.options import ServedModel, describe, server_arguments, server_environment
from megatron_sd.rollout.vllm.request import ServedPolicy
from megatron_sd.rollout.vllm.server_process import ServerProcess
from megatron_sd.rollout.vllm.servers_engine import Servers, VllmEngine
from megatron_sd.search.tokens import TextCodec, load_codec
from tests.rollout.fakes import byte_level_tokenizer

START_TIMEOUT_S = 900.0
BLOCK = 32
MAX_LENGTH = 384
# Between vLLM's kernels and torch, nats, both in float32: with these large random weights up to 1.3e-4 was
# measured on AVX-512, before and after the change that met it. Old weights are off by more than 1.
CLOSE = 2.5e-4 if cpu_library.INSTRUCTION_SET == "avx512" else 1e-4
SIZES = {
    "vocab_size": 448,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
HEAD_DIM = {"qwen2": {}, "qwen3": {"head_dim": 32}}
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
KINDS = ("qwen2-tied-tp1", "qwen2-untied-tp2", "qwen3-tied-tp2", "qwen3-untied-tp1")


def write_policy(directory: Path, family: str, *, tied: bool, seed: int = 0, **sizes: int) -> Path:
    """A random policy with its tokenizer. Its generation settings would spoil the sampling distribution if
    they were applied."""
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**(SIZES | HEAD_DIM[family] | sizes), tie_word_embeddings=tied))
    model.generation_config.update(
        top_k=1, top_p=0.5, repetition_penalty=1.5, do_sample=True, eos_token_id=[1]
    )
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def limits(tensor_parallel_size: int = 1, **changes: object) -> RolloutConfig:
    own = {
        "tensor_parallel_size": tensor_parallel_size,
        "kv_cache_gib": 1 / 16,
        "block_tokens": BLOCK,
        **changes,
    }
    return RolloutConfig(
        max_rollout_tokens=MAX_LENGTH, max_concurrent_sequences=32, engine="vllm", vllm=VllmConfig(**own)
    )


@dataclass(eq=False)
class Served:
    """A server over a policy directory. engine: None until connect()."""

    directory: Path
    process: ServerProcess
    engine: VllmEngine | None = None
    version: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(path=str(self.directory), dtype="float32")

    @property
    def codec(self) -> TextCodec:
        return load_codec(str(self.directory))

    def policy(self) -> ServedPolicy:
        return policy_of(self.directory)

    def connect(self) -> Served:
        """Wait until it serves, and keep one engine over it."""
        if self.engine is None:
            self.process.wait_until_ready(START_TIMEOUT_S)
            self.engine = make_engine([self.process.url], self.directory)
            self.weights = dict(self.trainer().named_parameters())
        return self

    def trainer(self) -> PreTrainedModel:
        """The policy as the trainer has it: transformers, float32, with the weights published last."""
        family = (
            "qwen2" if ServedModel.read(str(self.directory)).architecture.startswith("Qwen2") else "qwen3"
        )
        model = FAMILIES[family][1].from_pretrained(self.directory, dtype=torch.float32).eval()
        if self.weights:
            model.load_state_dict(self.weights, strict=False)
            model.tie_weights()
        return model

    def perturbed(self, seed: int) -> dict[str, torch.Tensor]:
        """Other weights, far enough from the published ones that their log-probabilities differ by more
        than 1."""
        noise = torch.Generator().manual_seed(seed)
        return {
            name: value.detach() + 0.1 * torch.randn(value.shape, generator=noise)
            for name, value in self.weights.items()
        }

    def publish(self, weights: dict[str, torch.Tensor]) -> None:
        """In two buckets, so that fused parameters come in parts."""
        names = sorted(weights)
        self.version += 1
        self.engine.begin_update()
        for part in (names[::2], names[1::2]):
            self.engine.load_bucket([(name, weights[name]) for name in part])
        self.engine.finish_update(self.version)
        self.weights = weights

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.process.stop()


def start(kind: str, directory: Path) -> Served:
    """Write the kind's policy and start a server over it, without waiting."""
    family, tied, size = kind.split("-")
    write_policy(directory / "policy", family, tied=tied == "tied")
    process = server(directory / "policy", limits(int(size.removeprefix("tp"))), directory / "server.log")
    return Served(directory=directory / "policy", process=process)


def server(policy: Path, rollout: RolloutConfig, log: Path) -> ServerProcess:
    """A server over a policy directory, on a port of its own."""
    port = free_port()
    model = ModelConfig(path=str(policy), dtype="float32")
    return ServerProcess(
        server_arguments(model, rollout, host="127.0.0.1", port=port, on_cpu=True),
        server_environment(os.environ, rollout, replica=0, on_cpu=True),
        url=f"http://127.0.0.1:{port}",
        log=log,
    )


def policy_of(directory: Path, **changes: object) -> ServedPolicy:
    """What an engine is told of the policy; changes: of the description."""
    shape, model = ServedModel.read(str(directory)), ModelConfig(path=str(directory), dtype="float32")
    return ServedPolicy(
        description=describe(shape, model) | changes,
        eos_ids=eos_ids(str(directory), load_codec(str(directory))),
        vocabulary_size=shape.vocabulary_size,
        max_length=MAX_LENGTH,
    )


def make_engine(
    urls: Sequence[str],
    directory: Path,
    *,
    processes: Sequence[ServerProcess] = (),
    timeout_s: float = 300.0,
    **changes: object,
) -> VllmEngine:
    servers = Servers(
        urls=tuple(urls),
        processes=tuple(processes),
        publishes=True,
        publish_host="127.0.0.1",
        num_replicas=len(urls),
    )
    codec, policy = load_codec(str(directory)), policy_of(directory, **changes)
    return VllmEngine(servers, codec, policy, start_timeout_s=START_TIMEOUT_S, request_timeout_s=timeout_s)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random ids that no end-of-sequence id is among."""
    return tuple(np.random.default_rng([length, seed]).integers(2, 420, length).tolist())


def ask(name: str = "a", prompt_ids: Sequence[int] = (5, 6, 7), **changes) -> GenerationRequest:
    own = GenerationRequest(
        session=name, prompt_ids=tuple(prompt_ids), max_new_tokens=16, temperature=1.0, seed=3, stop=()
    )
    return replace(own, **changes)


def serve(engine: VllmEngine, *requests: GenerationRequest) -> list[Completion]:
    """All requests at once; every session is released."""

    async def run():
        completions = await asyncio.gather(*(engine.generate(request) for request in requests))
        for request in requests:
            engine.release(request.session)
        return completions

    return asyncio.run(run())


def trainer_logprobs(model: PreTrainedModel, request: GenerationRequest, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities of a completion from one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt_ids, *ids]])).logits[
            0, len(request.prompt_ids) - 1 : -1
        ]
    logits = logits.float() / (request.temperature or 1.0)
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


def gap(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], completions: Sequence[Completion]
) -> float:
    """The largest difference between engine and trainer."""
    pairs = zip(requests, completions, strict=True)
    return max(float(np.abs(trainer_logprobs(model, r, c.ids) - c.logprobs).max()) for r, c in pairs)
