"""Runs of `sd-search sft` that tests have in common, and what `sd-search eval` says beside them."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path

from data_prep.episodes.select import SelectConfig, select
from data_prep.episodes.selection import Selection
from data_prep.world.world import WorldConfig
from eval.run import EvalConfig, evaluate
from eval.sample import SampleConfig, sample
from eval.samples import SAMPLES_NAME, read_results
from launch.programs import make_world
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"
SFT = "megatron_sd.sft"
LIMITS = {
    "max_search_turns": 4,
    "max_turn_tokens": 24,
    "max_observation_tokens": 48,
    "max_rollout_tokens": 640,
}
NUM_QUESTIONS = 12
NUM_STEPS = 4
LAST = f"step_{NUM_STEPS:08}"


def make_episodes(folder: Path) -> Path:
    """Of the start policy's rollouts in a small world, which lies beside them."""
    make_world(WorldConfig(output=str(folder / "world"), num_train_questions=30, num_eval_questions=20))
    sample(
        SampleConfig(
            model=ModelConfig(path=str(START_POLICY), dtype="float32"),
            retriever=RetrieverConfig(corpus=str(folder / "world" / "corpus"), top_k=1),
            questions=str(folder / "world" / "questions.jsonl"),
            limit=20,
            num_samples=5,
            output=str(folder / "sample"),
            protocol=ProtocolConfig(preset="compact"),
            rollout=RolloutConfig(questions_per_step=20, **LIMITS),
            reward=RewardConfig(answer="em"),
        )
    )
    wanted = Selection(block_format="outcome_first", validation_share=0.25)
    select(SelectConfig(rollouts=str(folder / "sample"), output=str(folder / "episodes"), selection=wanted))
    return folder / "episodes"


def arguments(episodes: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Of `sd-search sft`: four steps of six episodes under a cosine."""
    return [
        f"--model.path={START_POLICY}",
        "--model.dtype=float32",
        f"--episodes={episodes}",
        f"--run_dir={run_dir}",
        f"--num_steps={NUM_STEPS}",
        "--episodes_per_step=6",
        "--optimizer.learning_rate=2e-3",
        "--optimizer.warmup_steps=0",
        "--optimizer.schedule=cosine",
        "--optimizer.final_ratio=0.1",
        "--log.eval_every=2",
        "--log.transcripts_every=2",
        *overrides,
    ]


def looking(episodes: Path) -> list[str]:
    """Options of an evaluation: before step 1, after steps 3 and 4."""
    world = episodes.parent / "world"
    return [
        f"--eval.questions={world / 'questions.jsonl'}",
        "--eval.split=eval",
        f"--eval.limit={NUM_QUESTIONS}",
        "--eval.every=3",
        f"--retriever.corpus={world / 'corpus'}",
        "--retriever.top_k=1",
        "--protocol.preset=compact",
        *(f"--rollout.{name}={value}" for name, value in LIMITS.items()),
    ]


def wait_for_step(step: int, run_dir: Path) -> None:
    """Until the run has written down the step, or for four minutes."""
    log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and f'"step": {step}' in log.read_text()):
        time.sleep(0.02)


def figures(episodes: Path, model: Path, output: Path) -> dict[str, float]:
    """Of the same questions by `sd-search eval`."""
    world = episodes.parent / "world"
    evaluate(
        EvalConfig(
            model=ModelConfig(path=str(model), dtype="float32"),
            retriever=RetrieverConfig(corpus=str(world / "corpus"), top_k=1),
            questions=str(world / "questions.jsonl"),
            split="eval",
            limit=NUM_QUESTIONS,
            output=str(output),
            protocol=ProtocolConfig(preset="compact"),
            rollout=RolloutConfig(**LIMITS),
        )
    )
    samples = [own for result in read_results(output / SAMPLES_NAME).values() for own in result.samples]
    return {
        "eval/reward/em": sum(own.figures["em"] for own in samples) / NUM_QUESTIONS,
        "eval/reward/format_valid": sum(own.figures["format_valid"] for own in samples) / NUM_QUESTIONS,
        "eval/rollout/searches": sum(len(own.queries) for own in samples) / NUM_QUESTIONS,
    }
