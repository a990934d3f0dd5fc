"""A plain GRPO step (generation and update, no search) by this project and by TRL, of the same model on the
same prompts."""

from __future__ import annotations

import asyncio
import random
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does. Completions all have `completion_tokens`: no end of sequence ends one."""

    num_prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    microbatch_tokens: int  # of ours; TRL's microbatches are as many rollouts as fit
    gradient_checkpointing: bool = False

    @property
    def num_rollouts(self) -> int:
        """Of a step."""
        return self.num_prompts * self.group_size

    @property
    def num_tokens(self) -> int:
        """Of a step, prompts included."""
        return self.num_rollouts * (self.prompt_tokens + self.completion_tokens)


def reward_of(number: int) -> float:
    """Any number that differs within a group."""
    return float(number % 7) / 7


def prompts_of(model: Path, count: int, length: int, seed: int = 0) -> list[str]:
    """Texts of `length` tokens each for the model's tokenizer: letters, or short words, that are one token
    each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [f" {a}{b}" for a in string.ascii_lowercase for b in string.ascii_lowercase]
    found = [word for word in words if len(tokenizer.encode(word, add_special_tokens=False)) == 1]
    pieces, rng = found or list(string.ascii_lowercase), random.Random(seed)
    texts = ["".join(rng.choices(pieces, k=length)) for _ in range(count)]
    assert {len(tokenizer.encode(text, add_special_tokens=False)) for text in texts} == {length}
    return texts


class OurStep:
    """Generation by the embedded engine, update by the policy under DeepSpeed ZeRO-3, publish back into the
    engine."""

    def __init__(self, model: Path, work: Work):
        from megatron_sd.building.policy import build_policy
        from megatron_sd.building.trainer import choose_publisher
        from megatron_sd.config.checks import engine_reads_policy, engine_rests
        from megatron_sd.config.load import load
        from megatron_sd.distributed.parallel import Parallel
        from megatron_sd.distributed.world import join_world
        from megatron_sd.rollout.embedded.engine import TorchEngine
        from megatron_sd.rollout.embedded.weights import load_model
        from megatron_sd.search.tokens import load_codec

        settings = {
            "run_dir": model / "run",
            "model.path": model,
            "model.dtype": "float32",
            "model.gradient_checkpointing": str(work.gradient_checkpointing).lower(),
            "data.train": "none",
            "retriever.corpus": "none",
            "policy_loss.kl_weight": 0,
            "optimizer.learning_rate": 1e-5,
            "distill.block": "none",
            "update.max_microbatch_tokens": work.microbatch_tokens,
            "update.pack_sequences": "true",
            "model.attention": "varlen",  # prompts of a group are read once
        }
        self.work, self.model, self.step = work, model, 0
        self.config = load([f"--{key}={value}" for key, value in settings.items()])
        self.world = join_world()
        self.codec = load_codec(str(model))
        shares = engine_reads_policy(self.config, self.world.size)
        self.rests = engine_rests(self.config, self.world.size)
        weights = load_model(str(model), dtype=torch.float32, device=self.world.device, on_demand=shares)
        self.engine = TorchEngine(weights, self.codec, max_rows=work.num_rollouts)
        self.engine._is_eos[:] = False
        self.policy = build_policy(self.config, Parallel.of(self.config.update, self.world))
        self.publisher = choose_publisher(self.policy, self.config, self.engine)
        self.publisher.publish(self.policy, self.engine, 0)

    def __call__(self) -> None:
        """One whole step."""
        from megatron_sd.algorithm.advantages.from_rewards import grpo
        from megatron_sd.algorithm.distill_loss import TermWeights
        from megatron_sd.algorithm.packing.batches import pack
        from megatron_sd.algorithm.samples import query_tokens, to_samples
        from megatron_sd.distributed.collectives import shared_out

        prompts = prompts_of(self.model, self.work.num_prompts, self.work.prompt_tokens, seed=self.step)
        groups = shared_out(self.world, list(enumerate(prompts)), self.roll_out)
        nothing = [[()] * self.work.group_size for _ in groups]
        advantages = grpo(groups, self.config.advantage)
        samples = to_samples(groups, advantages, nothing, scope=query_tokens)
        limits = {"max_tokens": self.config.update.microbatch_tokens, "world_size": self.world.size}
        batch = pack(samples, aggregation="token", layout=self.config.layout, **limits)[self.world.rank]
        if self.rests:
            self.engine.rest()
        for microbatch in batch:
            self.policy.accumulate(
                microbatch, batch.totals, TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
            )
        self.policy.step()
        self.step += 1
        self.publisher.publish(self.policy, self.engine, self.step)

    def roll_out(self, prompts: list[tuple[int, str]]) -> list:
        """Groups of scored rollouts of one turn each, of numbered prompts."""
        from megatron_sd.records import Question, Rollout, RolloutGroup, Scores, StopReason, Turn
        from megatron_sd.rollout.engine import GenerationRequest, awake

        size = self.work.group_size
        requests = [
            GenerationRequest(
                session=f"{self.step}/{number}/{index}",
                prompt_ids=self.codec.encode(prompt),
                max_new_tokens=self.work.completion_tokens,
                temperature=1.0,
                seed=1000 * self.step + size * number + index,
                stop=(),
            )
            for number, prompt in prompts
            for index in range(size)
        ]

        async def generate() -> list:
            return await asyncio.gather(*(self.engine.generate(request) for request in requests))

        with awake(self.engine):
            completions = asyncio.run(generate())
        rollouts = [
            Rollout(
                question_id=request.session,
                index=place % size,
                prompt_ids=request.prompt_ids,
                turns=(Turn(completion_ids=completion.ids, completion_logprobs=completion.logprobs),),
                stop_reason=StopReason.ANSWERED,
                scores=Scores(reward=reward_of(sum(completion.ids)), em=0.0, f1=0.0, format_valid=1.0),
            )
            for place, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]
        question = Question(id="q", text="", golden_answers=("",))
        starts = range(0, len(rollouts), size)
        return [
            RolloutGroup(question=question, rollouts=tuple(rollouts[start : start + size]))
            for start in starts
        ]


def run_trl(
    model: Path, work: Work, num_steps: int, after_each_step: Callable[[], None] = lambda: None
) -> list[float]:
    """Train with TRL; returns the seconds of each step. `after_each_step` runs between steps, outside the
    clock."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Times each step of the trainer."""

        seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            after_each_step()

    fits = max(work.microbatch_tokens // (work.prompt_tokens + work.completion_tokens), 1)
    rows = max(size for size in range(1, fits + 1) if work.num_rollouts % size == 0)
    settings = GRPOConfig(
        output_dir=str(model / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.num_rollouts // rows,
        num_generations=work.group_size,
        max_completion_length=work.completion_tokens,
        max_steps=num_steps,
        generation_kwargs={"min_new_tokens": work.completion_tokens},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=work.gradient_checkpointing,
        beta=0.0,
        learning_rate=1e-5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lambda completions, **_: [
            reward_of(sum(map(ord, completion))) for completion in completions
        ],
        args=settings,
        train_dataset=Dataset.from_dict(
            {"prompt": prompts_of(model, work.num_prompts * num_steps, work.prompt_tokens)}
        ),
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds
