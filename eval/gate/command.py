"""`sd-search gate`: teacher lift of a model directory with its controls, and whether training may start
from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.gate.draws import Draws
from eval.gate.lift import SOURCE_DRAW, LiftConfig, LiftReport, measure_lift
from eval.identity import claim, own_code, questions_version, rollouts_identity
from megatron_sd.building.rollout_side import RolloutSide, build_rollout_side
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.distributed.collectives import hold_together, share, together
from megatron_sd.distributed.world import World, end_process, lone_world, world_of_program
from megatron_sd.door import exit_code_of
from megatron_sd.durable.files import write_whole
from megatron_sd.errors import MegatronSdError
from megatron_sd.observability.names import TRANSCRIPTS_NAME
from megatron_sd.observability.transcripts import Decode, group_record
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.search.questions import load_questions
from megatron_sd.search.rewards.reward import score

REPORT_NAME = "gate.json"
TRANSCRIPTS = Path(TRANSCRIPTS_NAME) / "gate.jsonl"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Measure the lift of `model` on `limit` questions. `rollout.questions_per_step` questions are sampled
    at a time, by any `rollout.engine`, and are kept in `output`: the same command goes on where it was
    killed."""

    model: ModelConfig
    retriever: RetrieverConfig
    questions: str  # a questions file
    output: str | None = None  # a directory for what was sampled, and gate.json
    split: str | None = "eval"  # keep only records whose `split` equals this
    limit: int = 400  # the first ones alone
    seed: int = 0  # of sampling
    # a JSON file, such as the model's coldstart.json, that takes the figures under the key "gate"
    record: str | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    lift: LiftConfig = field(default_factory=LiftConfig)


@dataclass(frozen=True, kw_only=True)
class RolloutSampler:
    """The rollouter as `eval.gate.lift.Sampler`: scored groups, a slice of the questions at a time, which
    all ranks share."""

    side: RolloutSide
    world: World
    reward: RewardConfig
    slice_size: int
    draws: Draws

    def __call__(
        self, questions: Sequence[Question], hindsight: Sequence[str] | None, draw: int
    ) -> list[RolloutGroup]:
        """Sample every question once, with its block if there are blocks; `draw` is the rollouts' step."""
        groups: list[RolloutGroup] = []
        with self.side.work.on(f"gate, draw {draw}", len(questions), "questions") as task:
            for start in range(0, len(questions), self.slice_size):
                part = slice(start, start + self.slice_size)
                asked = questions[part]
                found = self.draws.find(draw, start, asked)
                if found is None:
                    found = self._sample(asked, None if hindsight is None else hindsight[part], draw)
                    if self.world.is_first:
                        self.draws.keep(draw, start, found)
                groups += found
                task.add(done=len(asked))
        return score(groups, self.reward)

    def _sample(
        self, questions: Sequence[Question], blocks: Sequence[str] | None, draw: int
    ) -> list[RolloutGroup]:
        """Every rank samples its share; every rank gets all groups, in question order, or the error of
        one."""
        mine, own = share(self.world, questions), None if blocks is None else share(self.world, blocks)
        parts = together(self.world, lambda: self.side.rollouter.run(mine, step=draw, hindsight=own))
        return [group for part in parts for group in part]


def main(argv: Sequence[str]) -> None:
    """The command line of `gate`; a closed gate is an error."""
    config, world = parse(GateConfig, argv, "sd-search gate"), world_of_program()
    report = gate(config, world)
    if not world.is_first:
        return
    lines = report.lines()
    print("\n".join(lines[:-1] if report.failures else lines))
    if report.failures:  # which the error tells
        raise MegatronSdError("the gate is closed: " + "; ".join(report.failures))


def gate(config: GateConfig, world: World | None = None) -> LiftReport:
    """Measure the lift and, with `config.record`, write it down; on every rank of `world` (None: this
    process).

    Raises DataError for a missing model, corpus or questions, ConfigError when `config.output` holds
    another gate's rollouts.
    """
    check_ranges(config)
    world = world or lone_world()
    questions = load_questions(config.questions, config.split, config.limit)
    with contextlib.ExitStack() as stack:
        if config.output is not None:
            stack.enter_context(hold_together(world, Path(config.output)))
        report = _measure(config, questions, world)
    if config.record is not None and world.is_first:
        _record(Path(config.record), config, len(questions), report)
    return report


def _measure(config: GateConfig, questions: Sequence[Question], world: World) -> LiftReport:
    output = None if config.output is None else Path(config.output)
    parts = config.model, config.protocol, config.rollout, config.retriever
    logs = output or Path(config.questions).parent
    with contextlib.closing(build_rollout_side(*parts, seed=config.seed, output=logs, world=world)) as side:
        draws = Draws(output)
        if output is not None:
            together(
                world,
                lambda: _begin(output, _identity(config, questions, side), draws) if world.is_first else None,
            )
        draws.read()
        size = config.rollout.questions_per_step
        sampler = RolloutSampler(side=side, world=world, reward=config.reward, slice_size=size, draws=draws)
        source: list[RolloutGroup] = []

        def sample(
            asked: Sequence[Question], hindsight: Sequence[str] | None, draw: int
        ) -> list[RolloutGroup]:
            groups = sampler(asked, hindsight, draw)
            if draw == SOURCE_DRAW:
                source.extend(groups)
            return groups

        report = measure_lift(sample, questions, config.lift)
        if output is not None and world.is_first:
            _write(output, report, source, side.environment.codec.decode)
    return report


def _write(output: Path, report: LiftReport, groups: Sequence[RolloutGroup], decode: Decode) -> None:
    """The figures, and for `report` and `credit` the rollouts without a block that blocks were made of."""
    path = output / TRANSCRIPTS
    path.parent.mkdir(exist_ok=True)
    records = [group_record(group, [""] * len(group.rollouts), decode) for group in groups]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
    write_whole(output / REPORT_NAME, json.dumps(report.to_json(), indent=1) + "\n")


def _begin(output: Path, identity: Mapping[str, Any], draws: Draws) -> None:
    """Make the output this gate's, or go on with it."""
    claim(output, identity, {"gate": _section(LiftConfig())})
    draws.mend()


def _identity(config: GateConfig, questions: Sequence[Question], side: RolloutSide) -> dict[str, Any]:
    """What two starts must have in common to be one gate."""
    own = config.model, config.retriever, config.protocol, config.rollout
    return {
        "gate": _section(config.lift),
        "questions_version": questions_version(questions),
        "num_questions": len(questions),
        "group_size": config.rollout.group_size,
        "questions_per_step": config.rollout.questions_per_step,
        "temperature": config.rollout.temperature,
        "seed": config.seed,
        "reward": dataclasses.asdict(config.reward),
        **rollouts_identity(*own, corpus_version=side.retriever.corpus_version),
        **own_code(config),
    }


def _section(lift: LiftConfig) -> dict[str, Any]:
    """What of it decides what is sampled, as JSON values."""
    return dataclasses.asdict(lift) | {"variants": list(lift.variants), "num_resamples": None}


def _record(path: Path, config: GateConfig, num_questions: int, report: LiftReport) -> None:
    """Add the figures to a JSON file, beside what else it says."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    world = Path(config.questions).with_name("world.json")
    figures = {
        "world": json.loads(world.read_text(encoding="utf-8"))["config"]
        if world.exists()
        else config.questions,
        "split": config.split,
        "num_questions": num_questions,
        "group_size": config.rollout.group_size,
        "max_search_turns": config.rollout.max_search_turns,
        "temperature": config.rollout.temperature,
    }
    path.write_text(
        json.dumps(known | {"gate": figures | report.to_json()}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    end_process(exit_code_of(lambda: main(sys.argv[1:]) or 0))
