"""A judge's verdicts as a further figure of an evaluation.

The same command goes on where it was killed. A judge that cannot be reached, or whose reply is neither yes nor
no, gives no figure: it is counted, and never a 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.samples import QuestionResult, Sample
from megatron_sd.config import JudgeConfig
from megatron_sd.errors import RetrievalError
from megatron_sd.observability.progress import Task
from megatron_sd.search.rewards.judge import AnswerJudge, GivenAnswer

JUDGEMENTS_NAME = "judgements.jsonl"
FIGURE, FAILED = "judge", "judge_failed"
Place = tuple[str, int]  # a question's id, and the number of a sample


@dataclass(frozen=True, kw_only=True)
class EvalJudgeConfig(JudgeConfig):
    """The judge of an evaluation."""

    # of the answers; with more the evaluation ends by an error, and goes on with the same command
    max_failed_share: float = 0.05


def judge(
    results: Sequence[QuestionResult], config: EvalJudgeConfig, output: Path, task: Task
) -> list[QuestionResult]:
    """The results with a figure `judge` for every answer: 1.0 when the judge says yes. No answer is 0.0,
    and is not asked; rollouts that are no data have none. Where the judge failed the figure is missing, and
    judge_failed 1.0.

    Raises RetrievalError when it failed for more than max_failed_share of the answers, DataError for
    judgements that cannot be read, ConfigError when the server refuses what it is asked.
    """
    answers = {
        (result.question_id, number): GivenAnswer(
            question=result.question, golden_answers=result.golden_answers, answer=sample.answer
        )
        for result in results
        for number, sample in enumerate(result.samples)
        if sample.answer is not None and not sample.stop_reason.is_infrastructure
    }
    verdicts = AnswerJudge(config, output / JUDGEMENTS_NAME).verdicts(list(answers.values()), task)
    if len(verdicts.failures) > config.max_failed_share * max(1, len(answers)):
        raise RetrievalError(
            f"judge: {len(verdicts.failures)} of {len(answers)} answers could not be judged, expected at most"
            f" {config.max_failed_share:.0%} (judge.max_failed_share); the first cause: {verdicts.failures[0]}; what was"
            " judged is kept: run the same command again"
        )
    known = dict(zip(answers, verdicts.found, strict=True))
    return [_with_judgements(result, known) for result in results]


def _with_judgements(result: QuestionResult, known: Mapping[Place, float | None]) -> QuestionResult:
    samples = tuple(
        dataclasses.replace(sample, figures=_judged(sample, (result.question_id, number), known))
        for number, sample in enumerate(result.samples)
    )
    return dataclasses.replace(result, samples=samples)


def _judged(sample: Sample, place: Place, known: Mapping[Place, float | None]) -> Mapping[str, float | None]:
    figures: dict[str, Any] = {n: v for n, v in sample.figures.items() if n not in (FIGURE, FAILED)}
    if sample.stop_reason.is_infrastructure:
        return figures
    if place not in known:
        return figures | {FIGURE: 0.0, FAILED: 0.0}
    if known[place] is None:
        return figures | {FAILED: 1.0}
    return figures | {FIGURE: known[place], FAILED: 0.0}
