"""`sd-search sample`: rollouts of any model, by the agent or a prompted strategy, whole and with their
rewards, in a file.

Below `output`:

    evaluation.json      what was sampled: strategy, model, tokenizer, protocol, corpus, limits; a second run must agree with it
    rollouts.jsonl       a line a question (megatron_sd/rollout/stored.py)
    pass_rates.jsonl     a line a question: how many of its rollouts were right, and of valid form
    report.json          the same over all questions

The same command goes on where it was killed. `sd-search select` makes training episodes of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from eval.identity import check_causal, claim, questions_version, read_identity, rollouts_identity
from eval.run import refuse_many_failures
from eval.strategies.table import build_strategy, form_of
from megatron_sd.building.rollout_side import RolloutSide, build_rollout_side
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.distributed.collectives import hold_together, shared_out, together
from megatron_sd.distributed.world import World, end_process, lone_world, world_of_program
from megatron_sd.door import exit_code_of
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.records import Question, Rollout, RolloutGroup
from megatron_sd.rollout.stored import ROLLOUTS_NAME, SAMPLE_NAME, StoredGroups, fields_of
from megatron_sd.search.questions import load_questions
from megatron_sd.search.rewards.reward import score

RATES_NAME = "pass_rates.jsonl"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample `num_samples` rollouts of each question at rollout.temperature. rollout.questions_per_step
    questions are sampled at a time, by any `rollout.engine`, and are on disk before the next ones start."""

    model: ModelConfig
    retriever: RetrieverConfig
    questions: str  # a questions file
    output: str  # a directory; the same command goes on there
    # how questions are answered
    strategy: Literal[
        "agent", "direct", "cot", "rag", "ircot", "search_o1", "react", "self_ask", "thinker"
    ] = "agent"
    num_samples: int = 8  # rollouts of a question
    split: str | None = None  # keep only records whose `split` equals this
    limit: int | None = None  # the first ones alone
    seed: int = 0  # of sampling
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class PassRate:
    """What became of the usable rollouts of a question. right: exact match. form: share of valid form."""

    id: str
    num_rollouts: int
    num_right: int
    pass_rate: float
    form: float
    searches: float


def main(argv: Sequence[str]) -> None:
    """The command line of `sample`."""
    config, world = parse(SampleConfig, argv, "sd-search sample"), world_of_program()
    report = sample(config, world)
    if world.is_first:
        print("\n".join(lines_of(report, Path(config.output))))


def sample(config: SampleConfig, world: World | None = None) -> dict[str, Any]:
    """Sample what is not there yet, on all ranks of `world` (None: this process); write and return the
    report.

    Raises DataError for a missing model, corpus or questions file and for damaged rollouts, ConfigError
    when `output` holds other rollouts or another process writes to it, RolloutError when more than
    rollout.max_failed_share of a slice fail: what was sampled is kept.
    """
    check_ranges(config)
    world, output = world or lone_world(), Path(config.output)
    questions = load_questions(config.questions, config.split, config.limit)
    check_causal(config.model.path)
    rollout = dataclasses.replace(config.rollout, group_size=config.num_samples, max_failed_share=1.0)
    parts = config.model, config.protocol, rollout, config.retriever
    with hold_together(world, output):
        with contextlib.closing(
            build_rollout_side(*parts, seed=config.seed, output=output, world=world)
        ) as side:
            together(world, lambda: _begin(config, questions, side) if world.is_first else None)
            _sample_missing(config, questions, side, world)
        return together(
            world, lambda: write_report(output, form_of(config.strategy)) if world.is_first else {}
        )[0]


def _begin(config: SampleConfig, questions: Sequence[Question], side: RolloutSide) -> None:
    """Make the output this sample's, or go on with it."""
    sampled = {name: getattr(config, name) for name in ("strategy", "num_samples", "seed")}
    own = config.model, config.retriever, config.protocol, config.rollout
    claim(
        Path(config.output),
        {
            **sampled,
            "questions_version": questions_version(questions),
            "num_questions": len(questions),
            "questions_per_step": config.rollout.questions_per_step,
            "temperature": config.rollout.temperature,
            "reward": dataclasses.asdict(config.reward),
            "tokenizer": side.environment.codec.fingerprint,
            **rollouts_identity(*own, corpus_version=side.retriever.corpus_version),
        },
    )
    (Path(config.output) / ROLLOUTS_NAME).touch()
    cut_torn_line(Path(config.output) / ROLLOUTS_NAME)


def _sample_missing(
    config: SampleConfig, questions: Sequence[Question], side: RolloutSide, world: World
) -> None:
    """What has no line yet, slice by slice. Slices do not depend on what is done already: sampling that
    goes on batches the same questions together, and rounding is the same. A question of which no rollout is
    data gets no line, and is asked once more."""
    path, size = Path(config.output) / ROLLOUTS_NAME, config.rollout.questions_per_step
    done = together(world, lambda: _done(path) if world.is_first else None)[0]
    strategy = build_strategy(config.strategy, side, top_k=config.retriever.top_k, seed=config.seed)
    with side.work.on("sample", len(questions), "questions") as task:
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            missing = [question for question in asked if question.id not in done]
            if missing:
                groups = shared_out(
                    world,
                    missing,
                    lambda mine: score(strategy.run(mine, step=0, greedy=False), config.reward),
                )
                if world.is_first:
                    append_lines(path, [fields_of(group) for group in groups if group.usable])
                refuse_many_failures(groups, config.rollout.max_failed_share)
            task.add(done=len(asked))


def _done(path: Path) -> set[str]:
    return {group.question.id for group in StoredGroups(path)}


def write_report(output: Path, form: Callable[[Rollout], float]) -> dict[str, Any]:
    """pass_rates.jsonl and report.json of what lies in rollouts.jsonl; the report."""
    rates = [pass_rate(group, form) for group in StoredGroups(output / ROLLOUTS_NAME)]
    lines = "".join(json.dumps(dataclasses.asdict(rate), ensure_ascii=False) + "\n" for rate in rates)
    (output / RATES_NAME).write_text(lines, encoding="utf-8")
    report = {
        "num_sampled": len(rates),
        "num_rollouts": sum(rate.num_rollouts for rate in rates),
        "pass_rate": _mean(rate.pass_rate for rate in rates),
        "any_right": _mean(rate.num_right > 0 for rate in rates),
        "mixed": _mean(0 < rate.num_right < rate.num_rollouts for rate in rates),
        "form": _mean(rate.form for rate in rates),
        "searches": _mean(rate.searches for rate in rates),
    }
    report = read_identity(output) | report
    (output / SAMPLE_NAME).write_text(
        json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return report


def _mean(values: Iterable[float]) -> float | None:
    """Rounded for people; None of nothing."""
    found = list(values)
    return round(fmean(found), 4) if found else None


def pass_rate(group: RolloutGroup, form: Callable[[Rollout], float]) -> PassRate:
    """Of a scored group with a usable rollout. form: of eval/strategies/table.py."""
    usable = group.usable
    num_right = sum(rollout.scores.em == 1.0 for rollout in usable)
    return PassRate(
        id=group.question.id,
        num_rollouts=len(usable),
        num_right=num_right,
        pass_rate=num_right / len(usable),
        form=fmean(form(rollout) for rollout in usable),
        searches=fmean(len(rollout.queries) for rollout in usable),
    )


def lines_of(report: dict[str, Any], output: Path) -> list[str]:
    """The report for people."""
    if not report["num_sampled"]:
        return ["no rollout is data; the same command asks once more"]
    sampled = (
        f"{report['num_rollouts']} rollouts of {report['num_sampled']} of {report['num_questions']} questions"
    )
    shares = (
        f"right {report['pass_rate']:.3f}, of valid form {report['form']:.3f}, searches"
        f" {report['searches']:.2f}"
    )
    groups = (
        f"questions with a right rollout {report['any_right']:.3f}, with right and wrong ones"
        f" {report['mixed']:.3f}"
    )
    return [
        f"{sampled}: {shares}",
        groups,
        f"written to {output / ROLLOUTS_NAME}; by question: {output / RATES_NAME}",
    ]


if __name__ == "__main__":
    end_process(exit_code_of(lambda: main(sys.argv[1:]) or 0))
