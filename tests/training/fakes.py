"""Tiny real models, random rollouts and configurations for the tests of the update."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_sd.building.policy import build_policy
from megatron_sd.config import (
    AlphaConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    RetrieverConfig,
    UpdateConfig,
)
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.world import World
from megatron_sd.records import TrainingSample
from megatron_sd.training.policy import Policy

VOCABULARY = 97
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}

gc.freeze()  # DeepSpeed collects garbage at every start; without this it walks all imported modules each time


def write_model(directory: Path, *, tied: bool = True, seed: int = 0, family: str = "qwen2", **sizes) -> Path:
    """A random model directory: 2 layers of 32, vocabulary 97, unless sizes say otherwise."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "attention_dropout": 0.1,
    } | sizes
    config_class, model_class = FAMILIES[family]
    model_class(config_class(**sizes)).save_pretrained(directory)
    return directory


def make_config(model_path: Path, *, kl_weight: float = 0.0, aggregation: str = "token", **parts) -> Config:
    """A float32 run; parts: model, distill, optimizer, update, checkpoint keyword
    dictionaries."""
    model = {"dtype": "float32"} | parts.pop("model", {})
    if isinstance(model.get("lora"), dict):
        model["lora"] = LoraConfig(**model["lora"])
    return Config(
        run_dir=str(model_path.parent / "run"),
        model=ModelConfig(path=str(model_path), **model),
        data=DataConfig(train="none.jsonl"),
        retriever=RetrieverConfig(corpus="none"),
        policy_loss=PolicyLossConfig(kl_weight=kl_weight, aggregation=aggregation),
        distill=DistillConfig(
            **({"alpha": AlphaConfig(value=0.5, warmup_steps=0)} | parts.pop("distill", {}))
        ),
        optimizer=OptimizerConfig(**({"learning_rate": 1e-3} | parts.pop("optimizer", {}))),
        update=UpdateConfig(**parts.pop("update", {})),
        checkpoint=CheckpointConfig(**parts.pop("checkpoint", {})),
        **parts,
    )


def make_policy(config: Config, world: World) -> Policy:
    """The policy of a run on these ranks."""
    return build_policy(config, Parallel.of(config.update, world))


def make_samples(
    num: int,
    *,
    seed: int = 0,
    groups: int = 3,
    longest_turn: int = 6,
    vocabulary: int = VOCABULARY,
    one_prompt_a_group: bool = False,
):
    """Random multi-turn samples: prompts, completions and observations; the last group has no spread; some
    have no query, some no teacher, some share a teacher prompt. one_prompt_a_group: as rollouts have it;
    else each has its own."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> np.ndarray:
        return rng.integers(0, vocabulary, size)

    samples = []
    shared = [tuple(int(i) for i in draw(size)) for size in (7, 12, 9)]
    for number in range(num):
        prompt = draw(rng.integers(2, 6))
        if one_prompt_a_group:
            prompt = np.array(shared[number % groups % 3][:5])
        ids, mask, query_positions = list(prompt), [False] * len(prompt), []
        turns = [0] * len(prompt)
        for turn in range(rng.integers(1, 4)):
            length = int(rng.integers(1, longest_turn + 1))
            start = int(rng.integers(0, length))
            if number % 4 != 3:  # every fourth rollout never searches
                query_positions += range(len(ids) + start, len(ids) + int(rng.integers(start, length + 1)))
            observation = int(rng.integers(0, 4))
            ids += list(draw(length + observation))
            mask += [True] * length + [False] * observation
            turns += [turn] * length + [0] * observation
        group = number % groups
        own = tuple(int(i) for i in draw(rng.integers(4, 9))) + tuple(int(i) for i in prompt)
        samples.append(
            TrainingSample(
                ids=np.array(ids, dtype=np.int64),
                prompt_length=len(prompt),
                loss_mask=np.array(mask),
                rollout_logprobs=np.where(mask, rng.normal(-3.0, 0.7, len(ids)), 0.0).astype(np.float32),
                query_positions=np.array(query_positions, dtype=np.int64),
                advantages=np.float32(0.0 if group == groups - 1 else rng.normal()) * np.array(mask),
                turns=np.array(turns, dtype=np.int64),
                group=group,
                group_has_spread=group != groups - 1,
                teacher_prompt_ids=None if number % 5 == 4 else own if number % 2 else shared[group % 3],
            )
        )
    return samples
