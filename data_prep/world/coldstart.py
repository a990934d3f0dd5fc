"""The cold start: a small Qwen2 model learns from mediocre demonstrations how to search, to answer and to
read hindsight blocks.

It starts from random weights, on one CPU core, with its own tokenizer. The result is a directory that
transformers and vLLM load: weights as safetensors, tokenizer, and coldstart.json with the command, the seed
and the figures.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from data_prep.world.demonstrations import BlockKind, Demonstration, DemonstratorConfig, make_demonstration
from data_prep.world.reading_probe import ReadingProbe
from data_prep.world.small_qwen import ATTENTION, SmallQwenShape, build_model
from data_prep.world.tokenizer import save_tokenizer, train_tokenizer
from megatron_sd.errors import DataError
from megatron_sd.search.presets import PRESETS

log = logging.getLogger(__name__)

RECORD_NAME = "coldstart.json"
# elsewhere it is emulated, four times slower
HAS_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
COMMAND = "sd-search coldstart --seed {seed} --num_steps {num_steps}"


@dataclass(frozen=True, kw_only=True)
class CurriculumStage:
    """A part of the curriculum: it ends at `until` (share of all steps); shares of episodes by kind of
    block."""

    until: float
    shares: Mapping[BlockKind, float]


# Copying from CORRECT attempts first; then one CORRECT against one INCORRECT attempt, where nothing but the
# label tells whom to
# follow; then whole groups with both outcomes; last, blocks as rollouts will produce them, all wrong and
# foreign ones included.
CURRICULUM = (
    CurriculumStage(until=0.08, shares={"none": 0.5, "only_correct": 0.5}),
    CurriculumStage(until=0.25, shares={"none": 0.3, "only_correct": 0.1, "pair": 0.6}),
    CurriculumStage(until=0.5, shares={"none": 0.3, "pair": 0.15, "mixed": 0.45, "natural": 0.1}),
    CurriculumStage(
        until=1.0,
        shares={
            "none": 0.35,
            "pair": 0.05,
            "mixed": 0.1,
            "natural": 0.32,
            "natural_correct": 0.08,
            "wrong_question": 0.07,
            "no_labels": 0.03,
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class ColdstartConfig:
    """`sd-search coldstart`. batch_tokens: tokens per step, padding included. block_weight,
    observation_weight: loss weight of a token of a hindsight block and of an observation; a completion
    token's is 1. Steps between log lines, probes and saves."""

    output: str = "runs/coldstart"  # a model directory
    # a cold start's directory to go on from, with its tokenizer; None: random weights
    start_from: str | None = None
    seed: int = 0  # of weights and demonstrations
    num_steps: int = 2500  # of training
    batch_tokens: int = 6144
    learning_rate: float = 6e-3  # after the warm-up
    weight_decay: float = 0.01  # of AdamW
    warmup_steps: int = 60  # over which the rate rises from 0
    decay_share: float = 0.5  # of the steps, over which the learning rate falls to zero
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it
    block_weight: float = 0.5
    observation_weight: float = 0.1
    vocab_size: int = 1024  # of the tokenizer
    log_every: int = 50  # steps
    probe_every: int = 200  # steps
    num_probe_episodes: int = 200  # of a probe
    save_every: int = 1000  # steps
    model: SmallQwenShape = field(default_factory=SmallQwenShape)
    demonstrator: DemonstratorConfig = field(default_factory=DemonstratorConfig)
    # until which share of the steps which kinds of blocks are shown how often
    curriculum: tuple[CurriculumStage, ...] = CURRICULUM


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tokenised demonstration. ids: [L] int64; weights: [L] float32, the loss weight of predicting each
    token."""

    ids: np.ndarray
    weights: np.ndarray


def build_tokenizer(config: ColdstartConfig) -> Qwen2Tokenizer:
    """Train the tokenizer on demonstrations of every kind, so that every word and tag of the world becomes
    one token."""
    rng = random.Random(f"tokenizer/{config.seed}")
    kinds: tuple[BlockKind, ...] = ("none", "natural", "only_correct", "no_labels")
    episodes = [
        make_demonstration(kind, PRESETS["compact"], config.demonstrator, rng)
        for _ in range(1000)
        for kind in kinds
    ]
    return train_tokenizer(
        (text for episode in episodes for _, text in episode.segments), vocab_size=config.vocab_size
    )


def encode(
    demonstrations: Sequence[Demonstration], tokenizer: Qwen2Tokenizer, config: ColdstartConfig
) -> list[Example]:
    """Tokenise segment by segment, as a rollout is: the ids of a segment never depend on its neighbours."""
    weight_of = {"prompt": 0.0, "completion": 1.0, "observation": config.observation_weight}
    texts = [text for demonstration in demonstrations for _, text in demonstration.segments]
    blocks = [demonstration.block for demonstration in demonstrations]
    encoded = iter(tokenizer(texts + blocks, add_special_tokens=False)["input_ids"])
    segments = [
        [(writer, next(encoded)) for writer, _ in demonstration.segments] for demonstration in demonstrations
    ]
    examples = []
    for parts in segments:
        num_block_tokens = len(next(encoded))
        weights = np.concatenate([np.full(len(ids), weight_of[writer], np.float32) for writer, ids in parts])
        weights[:num_block_tokens] = config.block_weight
        weights[0] = 0.0
        examples.append(
            Example(ids=np.concatenate([np.array(ids, np.int64) for _, ids in parts]), weights=weights)
        )
    return examples


def batches(
    kinds: Callable[[int], Mapping[BlockKind, float]], tokenizer: Qwen2Tokenizer, config: ColdstartConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (ids [B, S] int64 right-padded, weights [B, S] float32, zero on padding) of at most
    batch_tokens positions.

    `kinds(step)` gives the shares of episode kinds. Episodes are drawn in pools and batched by length.
    """
    rng = random.Random(f"coldstart/{config.seed}")
    step = 0
    while True:
        shares = kinds(step)
        chosen = rng.choices(list(shares), weights=list(shares.values()), k=1024)
        demonstrations = [
            make_demonstration(kind, PRESETS["compact"], config.demonstrator, rng) for kind in chosen
        ]
        pool = sorted(encode(demonstrations, tokenizer, config), key=lambda example: len(example.ids))
        groups = [_collate(group, tokenizer.pad_token_id) for group in _cut(pool, config.batch_tokens)]
        rng.shuffle(groups)
        yield from groups
        step += len(groups)


def _cut(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Consecutive groups of at most max_tokens positions, padded to the group's longest (the examples come
    shortest first)."""
    group: list[Example] = []
    for example in examples:
        if group and (len(group) + 1) * len(example.ids) > max_tokens:
            yield group
            group = []
        group.append(example)
    yield group


def _collate(group: Sequence[Example], padding_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(example.ids) for example in group)
    ids = torch.full((len(group), length), padding_id, dtype=torch.int64)
    weights = torch.zeros(len(group), length)
    for row, example in enumerate(group):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids)
        weights[row, : len(example.ids)] = torch.from_numpy(example.weights)
    return ids, weights


def build_optimizers(model: Qwen2ForCausalLM, config: ColdstartConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    rate, decay = config.learning_rate, config.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, config: ColdstartConfig) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    left = (config.num_steps - step) / max(1.0, config.decay_share * config.num_steps)
    return min(1.0, (step + 1) / config.warmup_steps, left)


def weighted_loss(model: Qwen2ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of every weighted token given those before it: sum of weight * loss over the sum
    of weights."""
    with torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        rows = weights[:, 1:] > 0
        logits = model.lm_head(hidden[rows]).float()
    losses = functional.cross_entropy(logits, ids[:, 1:][rows], reduction="none")
    return (losses * weights[:, 1:][rows]).sum() / weights.sum()


def stage_shares(step: int, config: ColdstartConfig) -> Mapping[BlockKind, float]:
    """The shares of the curriculum's stage that `step` lies in."""
    stages = (stage for stage in config.curriculum if step < stage.until * config.num_steps)
    return next(stages, config.curriculum[-1]).shares


def run_coldstart(config: ColdstartConfig) -> Path:
    """Train the model and write it to `config.output`: model.safetensors, tokenizer, coldstart.json.
    Returns that directory."""
    tokenizer, model = _start(config)
    optimizers = build_optimizers(model, config)
    num_probed, seed = config.num_probe_episodes, config.seed
    probe = ReadingProbe(
        tokenizer, PRESETS["compact"], config.demonstrator, num_episodes=num_probed, seed=seed
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "cold start: %d parameters, vocabulary %d, %d steps", num_parameters, len(tokenizer), config.num_steps
    )
    started, losses, num_tokens = time.monotonic(), [], 0
    stream = batches(lambda step: stage_shares(step, config), tokenizer, config)
    for step, (ids, weights) in zip(range(1, config.num_steps + 1), stream):
        losses.append(_train_step(model, optimizers, (ids, weights), step=step - 1, config=config))
        num_tokens += int((ids != tokenizer.pad_token_id).sum())
        if step % config.log_every == 0:
            elapsed = time.monotonic() - started
            log.info(
                "step %d/%d loss %.4f, %.0f tokens/s",
                step,
                config.num_steps,
                np.mean(losses),
                num_tokens / elapsed,
            )
            losses.clear()
        if step % config.probe_every == 0:
            readings = probe.measure(model)
            log.info(
                "step %d P(keyword that hits) %s",
                step,
                " ".join(f"{name} {p:.2f}" for name, p in readings.items()),
            )
        if step % config.save_every == 0 or step == config.num_steps:
            facts = {
                "step": step,
                "num_parameters": num_parameters,
                "num_tokens": num_tokens,
                "probe": probe.measure(model),
            }
            save(model, tokenizer, config, facts | {"train_s": round(time.monotonic() - started)})
    return Path(config.output)


def _start(config: ColdstartConfig) -> tuple[Qwen2Tokenizer, Qwen2ForCausalLM]:
    """A new tokenizer and random weights, or those of `config.start_from`. Raises DataError when that is no
    such directory."""
    if config.start_from is None:
        tokenizer = build_tokenizer(config)
        return tokenizer, build_model(config.model, vocab_size=len(tokenizer), seed=config.seed)
    if not (Path(config.start_from) / RECORD_NAME).exists():
        raise DataError(
            f"start_from {config.start_from!r} holds no {RECORD_NAME}, expected the output of an earlier cold"
            " start"
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(config.start_from)
    return tokenizer, Qwen2ForCausalLM.from_pretrained(config.start_from, attn_implementation=ATTENTION)


def _train_step(
    model: Qwen2ForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: tuple[torch.Tensor, torch.Tensor],
    *,
    step: int,
    config: ColdstartConfig,
) -> float:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(step, config)
    loss = weighted_loss(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def save(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, config: ColdstartConfig, facts: Mapping[str, object]
) -> None:
    """Write the model directory and, in coldstart.json, what made it."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)
    parameters = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    record = {
        "command": COMMAND.format(seed=config.seed, num_steps=config.num_steps),
        "config": parameters,
        **facts,
    }
    (output / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
