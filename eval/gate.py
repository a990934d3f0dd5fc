"""`sd-search gate`: teacher lift of a model directory with its controls, and whether training may start from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.lift import LiftConfig, LiftReport, measure_lift
from megatron_sd.build import build_rollout_side
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig, parse
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import MegatronSdError
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.search.questions import load_questions
from megatron_sd.search.reward import score


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Measure the lift of `model` on `limit` questions. `rollout.questions_per_step` questions are sampled at a time."""

    model: ModelConfig
    retriever: RetrieverConfig
    questions: str
    split: str | None = "eval"
    limit: int = 400
    seed: int = 0
    record: str | None = None  # a JSON file, such as the model's coldstart.json, that takes the figures under the key "gate"
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    lift: LiftConfig = field(default_factory=LiftConfig)


@dataclass(frozen=True, kw_only=True)
class RolloutSampler:
    """The rollouter as `eval.lift.Sampler`: scored groups, a slice of the questions at a time."""

    rollouter: Rollouter
    reward: RewardConfig
    slice_size: int

    def __call__(self, questions: Sequence[Question], hindsight: Sequence[str] | None, draw: int) -> list[RolloutGroup]:
        """Sample every question once, with its block if there are blocks; `draw` is the rollouts' step."""
        groups: list[RolloutGroup] = []
        for start in range(0, len(questions), self.slice_size):
            part = slice(start, start + self.slice_size)
            blocks = None if hindsight is None else hindsight[part]
            groups += self.rollouter.run(questions[part], step=draw, hindsight=blocks)
        return score(groups, self.reward)


def main(argv: Sequence[str]) -> None:
    """The command line of `gate`; a closed gate is an error."""
    report = gate(parse(GateConfig, argv, "sd-search gate"))
    print("\n".join(report.lines()))
    if report.failures:
        raise MegatronSdError("the gate is closed: " + "; ".join(report.failures))


def gate(config: GateConfig) -> LiftReport:
    """Measure the lift and, with `config.record`, write it down. Raises DataError for a missing model, corpus or questions."""
    questions = load_questions(config.questions, config.split, config.limit)
    world, output = lone_world(), Path(config.questions).parent
    parts = config.model, config.protocol, config.rollout, config.retriever
    with contextlib.closing(build_rollout_side(*parts, seed=config.seed, output=output, world=world)) as side:
        sampler = RolloutSampler(rollouter=side.rollouter, reward=config.reward, slice_size=config.rollout.questions_per_step)
        report = measure_lift(sampler, questions, config.lift)
    if config.record is not None:
        _record(Path(config.record), config, len(questions), report)
    return report


def _record(path: Path, config: GateConfig, num_questions: int, report: LiftReport) -> None:
    """Add the figures to a JSON file, beside what else it says."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    world = Path(config.questions).with_name("world.json")
    figures = {
        "world": json.loads(world.read_text(encoding="utf-8"))["config"] if world.exists() else config.questions,
        "split": config.split,
        "num_questions": num_questions,
        "group_size": config.rollout.group_size,
        "max_search_turns": config.rollout.max_search_turns,
        "temperature": config.rollout.temperature,
    }
    path.write_text(json.dumps(known | {"gate": figures | report.to_json()}, indent=1) + "\n", encoding="utf-8")
