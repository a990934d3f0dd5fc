"""A plain GRPO step (generation and update, no search) against TRL's GRPOTrainer, step by step in turn in one process.

    python kernels/bench/bench_grpo_step.py [--json FILE]          needs trl, a benchmark-only dependency

80 completions of 64 tokens (16 prompts x 5) on 96-token prompts; Qwen2 of 4 layers x 128, vocabulary 1,024, float32, two
threads, no KL, one optimiser step. Ours runs under DeepSpeed ZeRO-3. Neither side pays for its first step.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from baseline import Comparison, report
from tiny_model import random_prompts, write_model

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 16, 5, 96, 64
NUM_WARM_UP_STEPS, NUM_STEPS = 2, 8


def reward_of(length_seed: int) -> float:
    """Any number that differs within a group."""
    return float(length_seed % 7) / 7


class OurStep:
    """Generation by the embedded engine, update by the policy, publish back into the engine."""

    def __init__(self, model: Path):
        from megatron_sd.config import load
        from megatron_sd.distributed.world import join_world
        from megatron_sd.rollout.torch_engine import TorchEngine
        from megatron_sd.rollout.weights import load_model
        from megatron_sd.search.tokens import load_codec
        from megatron_sd.training.policy import load_policy
        from megatron_sd.training.publisher import GatherPublisher

        settings = {
            "run_dir": model / "run",
            "model.path": model,
            "model.dtype": "float32",
            "data.train": "none",
            "retriever.corpus": "none",
            "policy_loss.kl_weight": 0,
            "optimizer.learning_rate": 1e-5,
            "distill.block": "none",
        }
        self.config = load([f"--{key}={value}" for key, value in settings.items()])
        self.world = join_world()
        self.codec = load_codec(str(model), chat_template=False)
        weights = load_model(str(model), dtype=torch.float32, device=self.world.device)
        self.engine = TorchEngine(weights, self.codec, max_rows=NUM_PROMPTS * GROUP_SIZE)
        self.policy = load_policy(self.config, self.world)
        self.publisher = GatherPublisher()
        self.step = 0

    def __call__(self) -> None:
        """One whole step."""
        from megatron_sd.algorithm.advantage import group_advantages
        from megatron_sd.algorithm.distill_loss import TermWeights
        from megatron_sd.algorithm.packing import pack
        from megatron_sd.algorithm.samples import query_tokens, to_samples

        groups = self.roll_out(random_prompts(NUM_PROMPTS, PROMPT_TOKENS, seed=self.step))
        nothing = [[()] * GROUP_SIZE for _ in groups]
        samples = to_samples(groups, [group_advantages(group) for group in groups], nothing, scope=query_tokens)
        (batch,) = pack(samples, max_tokens=self.config.update.max_microbatch_tokens, world_size=1, aggregation="token")
        for microbatch in batch:
            self.policy.accumulate(microbatch, batch.totals, TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0))
        self.policy.step()
        self.step += 1
        self.publisher.publish(self.policy, self.engine, self.step)

    def roll_out(self, prompts: list[str]) -> list:
        """Groups of scored rollouts of one turn each."""
        from megatron_sd.records import Question, Rollout, RolloutGroup, Scores, StopReason, Turn
        from megatron_sd.rollout.engine import GenerationRequest

        requests = [
            GenerationRequest(
                session=f"{self.step}/{number}/{index}",
                prompt_ids=self.codec.encode(prompt),
                max_new_tokens=COMPLETION_TOKENS,
                temperature=1.0,
                seed=1000 * self.step + GROUP_SIZE * number + index,
                stop=(),
            )
            for number, prompt in enumerate(prompts)
            for index in range(GROUP_SIZE)
        ]

        async def generate() -> list:
            return await asyncio.gather(*(self.engine.generate(request) for request in requests))

        completions = asyncio.run(generate())
        rollouts = [
            Rollout(
                question_id=request.session,
                index=place % GROUP_SIZE,
                prompt_ids=request.prompt_ids,
                turns=(Turn(completion_ids=completion.ids, completion_logprobs=completion.logprobs),),
                stop_reason=StopReason.ANSWERED,
                scores=Scores(reward=reward_of(sum(completion.ids)), em=0.0, f1=0.0, format_valid=1.0),
            )
            for place, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]
        question = Question(id="q", text="", golden_answers=("",))
        starts = range(0, len(rollouts), GROUP_SIZE)
        return [RolloutGroup(question=question, rollouts=tuple(rollouts[start : start + GROUP_SIZE])) for start in starts]


def run_trl(model: Path, after_each_step) -> list[float]:
    """Train with TRL; returns the seconds of each step. `after_each_step` runs between steps, outside the clock."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Times each step of the trainer."""

        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.started)
            after_each_step()

    num_steps = NUM_WARM_UP_STEPS + NUM_STEPS
    settings = GRPOConfig(
        output_dir=str(model / "trl"),
        per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=COMPLETION_TOKENS,
        max_steps=num_steps,
        generation_kwargs={"min_new_tokens": COMPLETION_TOKENS},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
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
        reward_funcs=lambda completions, **_: [reward_of(sum(map(ord, completion))) for completion in completions],
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": random_prompts(NUM_PROMPTS * num_steps, PROMPT_TOKENS)}),
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(2)
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(model, vocabulary=1024, hidden=128, layers=4)
        ours: list[OurStep] = []

        def our_turn() -> None:
            if not ours:  # after TRL was built: a process group would make it wrap its model for several ranks
                ours.append(OurStep(model))
            started = time.perf_counter()
            ours[0]()
            seconds.append(time.perf_counter() - started)

        theirs = run_trl(model, our_turn)
    median_ours = statistics.median(seconds[NUM_WARM_UP_STEPS:])
    median_theirs = statistics.median(theirs[NUM_WARM_UP_STEPS:])
    print("seconds, ours", [round(s, 2) for s in seconds], "TRL", [round(s, 2) for s in theirs])
    report(
        "grpo_step",
        [Comparison(name="GRPO step", ours=median_ours, theirs=median_theirs, unit="s", against="TRL")],
        arguments.json,
    )


if __name__ == "__main__":
    main()
