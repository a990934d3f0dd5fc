"""`sd-search eval`: answers every question of a file by one strategy, and reports. The same command goes on
where it was killed.

Below `output`:

    evaluation.json          what is evaluated: strategy, model, corpus, questions, limits; a second run must agree with it
    samples.jsonl            one line a question (eval/samples.py)
    judgements.jsonl         what a judge said, by a hash of what it saw
    transcripts/             the first questions' rollouts, as text and as jsonl for `sd-search report`
    report.json, report.md   figures of each set, averages, intervals
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.identity import check_causal, claim, own_code, questions_version, rollouts_identity
from eval.judge import EvalJudgeConfig, judge
from eval.overlap import Overlap, measure_overlap
from eval.samples import SAMPLES_NAME, QuestionResult, append_results, read_results, to_result
from eval.strategies.runner import Strategy
from eval.strategies.table import build_strategy, form_of
from eval.summary import dumps, summarize, to_markdown
from megatron_sd.building.rollout_side import RolloutSide, build_rollout_side
from megatron_sd.config import (
    JudgeConfig,
    ModelConfig,
    ProtocolConfig,
    RetrieverConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.durable.run_lock import hold
from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.observability.transcripts import group_record, render_group
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.search.questions import load_questions
from megatron_sd.search.rewards.reward import own_scores, score

REPORT_NAME = "report.json"
TRANSCRIPTS = Path("transcripts") / "evaluation.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model directory. For the agent, `protocol` and the limits in `rollout` should be those it
    was trained with.

    rollout.questions_per_step questions are answered at a time, and are on disk before the next ones start.
    """

    model: ModelConfig
    retriever: RetrieverConfig
    questions: str  # a questions file
    output: str  # a directory; the same command goes on there
    # how questions are answered
    strategy: Literal[
        "agent", "direct", "cot", "rag", "ircot", "search_o1", "react", "self_ask", "thinker"
    ] = "agent"
    split: str | None = None  # keep only records whose `split` equals this
    limit: int | None = None  # the first ones alone
    # rollouts a question: 1 is greedy; more are sampled at rollout.temperature, for pass@k
    num_samples: int = 1
    seed: int = 0  # of sampling
    train_questions: str | None = None  # a questions file whose overlap with this one is reported
    train_split: str | None = None  # of train_questions
    num_transcripts: int = 50  # questions whose rollouts are kept whole
    num_resamples: int = 2000  # of the bootstrap over questions
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    # a language model that says whether an answer is right (eval/judge.py)
    judge: EvalJudgeConfig | None = None


def main(argv: Sequence[str]) -> None:
    """The command line of `evaluate`."""
    config = parse(EvalConfig, argv, "sd-search eval")
    check_ranges(config)
    report = evaluate(config)
    print(f"{to_markdown(report)}\none line a question: {Path(config.output) / SAMPLES_NAME}")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Answer what is not answered yet; write and return the report.

    Raises DataError for a missing model, corpus or questions file and for damaged samples, ConfigError when
    `output` holds another evaluation or another process writes to it, RolloutError when more than
    rollout.max_failed_share of a slice fail: what was answered is kept.
    """
    with hold(Path(config.output)):
        return _evaluate(config, Path(config.output))


def _evaluate(config: EvalConfig, output: Path) -> dict[str, Any]:
    own_scores(config.reward)  # what does not fit fails before a model is loaded
    if config.judge is not None and config.reward.judge is not None:
        raise ConfigError("judge, reward.judge: found both, expected one: both give the figure `judge`")
    # what cannot be written fails before the rollouts
    (output / TRANSCRIPTS).parent.mkdir(parents=True, exist_ok=True)
    questions = load_questions(config.questions, config.split, config.limit)
    check_causal(config.model.path)
    overlap = _overlap(config, questions)
    rollout = dataclasses.replace(config.rollout, group_size=config.num_samples, max_failed_share=1.0)
    side = build_rollout_side(
        config.model, config.protocol, rollout, config.retriever, seed=config.seed, output=output
    )
    with contextlib.closing(side):
        identity = _identity(config, questions, side)
        claim(output, identity)
        for name in (SAMPLES_NAME, TRANSCRIPTS):
            cut_torn_line(output / name)
        strategy = build_strategy(config.strategy, side, top_k=config.retriever.top_k, seed=config.seed)
        _answer_missing(config, questions, strategy, side)
        results = list(read_results(output / SAMPLES_NAME).values())
        if config.judge is not None:
            results = _judge(results, config.judge, output, side)
    summary = summarize(results, num_resamples=config.num_resamples, seed=config.seed)
    report = identity | {"num_failed": sum(result.failed for result in results)} | summary.to_json()
    report["overlap"] = dataclasses.asdict(overlap) if overlap else None
    (output / REPORT_NAME).write_text(dumps(report), encoding="utf-8")
    (output / REPORT_NAME).with_suffix(".md").write_text(to_markdown(report), encoding="utf-8")
    return report


def _judge(
    results: Sequence[QuestionResult], config: EvalJudgeConfig, output: Path, side: RolloutSide
) -> list[QuestionResult]:
    """The results with the judge's figures, which samples.jsonl then has, too, for `compare`."""
    with side.work.on("judge", sum(len(result.samples) for result in results), "answers") as task:
        judged = judge(results, config, output, task)
    changed = [now for was, now in zip(results, judged, strict=True) if was != now]
    append_results(output / SAMPLES_NAME, changed)
    return judged


def _judged_by(judge: JudgeConfig | None) -> dict[str, Any]:
    """What a judge that rewards has to be for two runs to be one evaluation."""
    if judge is None:
        return {}
    return {"reward_judge": {name: getattr(judge, name) for name in ("model", "prompt", "max_tokens")}}


def _identity(config: EvalConfig, questions: Sequence[Question], side: RolloutSide) -> dict[str, Any]:
    """What two runs must have in common to be one evaluation. A greedy one has no temperature."""
    sampling = (
        {} if config.num_samples == 1 else {"temperature": config.rollout.temperature, "seed": config.seed}
    )
    return {
        "strategy": config.strategy,
        "questions_version": questions_version(questions),
        "num_questions": len(questions),
        "num_samples": config.num_samples,
        **sampling,
        **_judged_by(config.reward.judge),
        **rollouts_identity(
            config.model,
            config.retriever,
            config.protocol,
            config.rollout,
            corpus_version=side.retriever.corpus_version,
        ),
        **own_code(config),
    }


def _overlap(config: EvalConfig, questions: Sequence[Question]) -> Overlap | None:
    if config.train_questions is None:
        return None
    return measure_overlap(questions, load_questions(config.train_questions, config.train_split))


def _answer_missing(
    config: EvalConfig, questions: Sequence[Question], strategy: Strategy, side: RolloutSide
) -> None:
    """Run what has no result yet or a failed one, slice by slice. Slices do not depend on what is done
    already: a resumed evaluation batches the same questions together, and rounding is the same."""
    samples = Path(config.output) / SAMPLES_NAME
    done = {name for name, result in read_results(samples).items() if not result.failed}
    size = config.rollout.questions_per_step
    kept_whole = {question.id for question in questions[: config.num_transcripts]}
    with side.work.on(f"evaluate {config.strategy}", len(questions), "questions") as task:
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            missing = [question for question in asked if question.id not in done]
            if missing:
                groups = score(strategy.run(missing, step=0, greedy=config.num_samples == 1), config.reward)
                _write_transcripts(
                    config, [group for group in groups if group.question.id in kept_whole], side
                )
                append_results(samples, [to_result(group, form_of(config.strategy)) for group in groups])
                refuse_many_failures(groups, config.rollout.max_failed_share)
            task.add(done=len(asked))


def _write_transcripts(config: EvalConfig, groups: Sequence[RolloutGroup], side: RolloutSide) -> None:
    path, decode = Path(config.output) / TRANSCRIPTS, side.environment.codec.decode
    blocks = [[""] * len(group.rollouts) for group in groups]
    append_lines(path, [group_record(group, own, decode) for group, own in zip(groups, blocks)])
    with path.with_suffix(".txt").open("a", encoding="utf-8", errors="replace") as text:
        text.writelines(render_group(group, own, decode) + "\n\n" for group, own in zip(groups, blocks))


def refuse_many_failures(groups: Sequence[RolloutGroup], limit: float) -> None:
    """Raise RolloutError when more than this share of the groups' rollouts failed for infrastructure
    reasons."""
    reasons = [rollout.stop_reason for group in groups for rollout in group.rollouts]
    failed = [reason for reason in reasons if reason.is_infrastructure]
    if len(failed) > limit * len(reasons):
        counts = {reason.value: failed.count(reason) for reason in sorted(set(failed))}
        raise RolloutError(
            f"{len(failed)} of {len(reasons)} rollouts failed ({counts}), expected at most {limit:.0%}"
            " (rollout.max_failed_share); what was answered is kept: see to engine and retriever, then run"
            " the same command"
        )
