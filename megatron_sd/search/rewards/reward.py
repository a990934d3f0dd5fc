"""What a rollout earns.

Answers come from `Rollout.answer` only, which is read from the policy's own tokens: a passage that holds an
answer tag earns nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_sd.config import RewardConfig, RewardJudgeConfig
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import RolloutError
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.seam import Seam, fault_of_number
from megatron_sd.records import Question, Rollout, RolloutGroup, Scores, StopReason
from megatron_sd.search.rewards.answers import ANSWER_SCORES, NORMALIZERS, Normalizer, exact_match, sub_em
from megatron_sd.search.rewards.form import format_valid
from megatron_sd.search.rewards.judge import AnswerJudge, GivenAnswer
from megatron_sd.search.rewards.shapes import REWARD_SHAPES, RewardParts, overlong_penalty

RolloutScore = Callable[[Rollout, Question], float]


def own_scores(config: RewardConfig) -> dict[str, RolloutScore]:
    """reward.own by name, each tried once. Raises ConfigError for one that does not fit, or reward.answer."""
    if isinstance(config.answer, OwnFunction):
        _own_score(config.answer, "reward.answer")
    return {name: _own_score(function, f"reward.own.{name}") for name, function in config.own.items()}


@functools.cache
def _own_score(name: OwnFunction, key: str) -> RolloutScore:
    seam: Seam[RolloutScore] = Seam(
        key=key,
        form="score(rollout: Rollout, question: Question) -> float",
        table={},
        example=_example_of_score,
        fault=lambda number, *_: fault_of_number(number),
    )
    return seam.choose(name)


def _example_of_score() -> tuple[Rollout, Question]:
    group = example_groups()[0]
    return dataclasses.replace(group.rollouts[0], scores=None), group.question


def hop_hit_rate(rollout: Rollout, supporting: Sequence[Sequence[str]]) -> float | None:
    """Share of hops of which any serving passage was retrieved in any turn; None when the hops are
    unknown."""
    if not supporting:
        return None
    found = {hit.passage.id for turn in rollout.turns for hit in turn.hits}
    return sum(not found.isdisjoint(passages) for passages in supporting) / len(supporting)


def score_rollout(
    rollout: Rollout, group: RolloutGroup, config: RewardConfig, verdict: float | None = None
) -> Scores:
    """What one rollout earned, by the shape that the configuration names (reward_shapes.py). No answer scores
    0. verdict: the judge's, where there is one."""
    normalize = NORMALIZERS[config.normalization]
    golds = group.question.golden_answers
    answer = dict.fromkeys(ANSWER_SCORES, 0.0)
    if rollout.answer is not None:
        answer = {name: compare(rollout.answer, golds, normalize) for name, compare in ANSWER_SCORES.items()}
    judged = {} if verdict is None else {"judge": verdict}
    valid = format_valid(rollout)
    parts = RewardParts(
        answer=_answer_score(rollout, group.question, judged | answer, config),
        **answer,
        answer_words=len((rollout.answer or "").split()),
        has_answer=rollout.answer is not None,
        format_valid=valid,
        num_searches=len(rollout.queries),
        found_gold=lambda: _found_gold(rollout, golds, normalize),
        noted_gold=lambda: _holds_gold(" ".join(turn.note for turn in rollout.turns), golds, normalize),
        num_sampled=sum(len(turn.completion_ids) for turn in rollout.turns),
    )
    penalty = overlong_penalty(parts.num_sampled, config)
    return Scores(
        reward=REWARD_SHAPES[config.shape](parts, config) + penalty,
        em=answer["em"],
        f1=answer["f1"],
        format_valid=valid,
        hop_hit_rate=hop_hit_rate(rollout, group.question.supporting),
        em_by_attempt=_em_by_attempt(rollout, golds, normalize),
        own=judged | {name: own(rollout, group.question) for name, own in own_scores(config).items()},
    )


def _answer_score(
    rollout: Rollout, question: Question, known: Mapping[str, float], config: RewardConfig
) -> float:
    if isinstance(config.answer, OwnFunction):
        return _own_score(config.answer, "reward.answer")(rollout, question)
    return known[config.answer]


def _em_by_attempt(
    rollout: Rollout, golden_answers: Sequence[str], normalize: Normalizer
) -> tuple[float, ...]:
    """Exact match of every attempt's answer, 0 without one; empty where there is one attempt."""
    answers = [turns[-1].answer for turns in rollout.attempts]
    if len(answers) < 2:
        return ()
    return tuple(
        0.0 if answer is None else exact_match(answer, golden_answers, normalize) for answer in answers
    )


def _found_gold(rollout: Rollout, golden_answers: Sequence[str], normalize: Normalizer) -> bool:
    """Some passage that a search found holds a gold answer."""
    passages = (hit.passage for turn in rollout.turns for hit in turn.hits)
    return any(_holds_gold(f"{p.title} {p.text}", golden_answers, normalize) for p in passages)


def _holds_gold(text: str, golden_answers: Sequence[str], normalize: Normalizer) -> bool:
    """As sub_em has it; a gold answer of which nothing is left counts as held by none."""
    golds = [gold for gold in golden_answers if normalize(gold)]
    return sub_em(text, golds, normalize) == 1.0


def score(groups: Sequence[RolloutGroup], config: RewardConfig) -> list[RolloutGroup]:
    """The groups with `Rollout.scores` filled in, infrastructure failures (which `RolloutGroup.usable`
    leaves out) included. An answer of which the judge says nothing makes its rollout no data (judge_failed). Raises
    RolloutError when there are too many of these."""
    verdicts = iter(_verdicts(groups, config))
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(_scored(r, group, config, verdict=next(verdicts)) for r in group.rollouts),
        )
        for group in groups
    ]


def _scored(rollout: Rollout, group: RolloutGroup, config: RewardConfig, *, verdict: float | None) -> Rollout:
    if config.judge is not None and verdict is None:
        failed = rollout.stop_reason if rollout.stop_reason.is_infrastructure else StopReason.JUDGE_FAILED
        rollout, verdict = dataclasses.replace(rollout, stop_reason=failed), 0.0  # of no data
    return dataclasses.replace(rollout, scores=score_rollout(rollout, group, config, verdict))


def _verdicts(groups: Sequence[RolloutGroup], config: RewardConfig) -> list[float | None]:
    """The judge's, rollout by rollout; 0.0 without an answer. None of each where there is no judge."""
    rollouts = [(group.question, rollout) for group in groups for rollout in group.rollouts]
    if config.judge is None:
        return [None] * len(rollouts)
    answers = [
        GivenAnswer(question=asked.text, golden_answers=asked.golden_answers, answer=rollout.answer)
        for asked, rollout in rollouts
        if rollout.answer is not None
    ]
    judge = _judge(config.judge)
    verdicts = judge.verdicts(answers)
    without = sum(one is None for one in verdicts.found)
    if without > config.judge.max_failed_share * len(answers):
        raise RolloutError(
            f"reward.judge: {without} of {len(answers)} answers could not be judged, expected at most"
            f" {config.judge.max_failed_share:.0%} (reward.judge.max_failed_share); the first cause:"
            f" {(*verdicts.failures, 'settled before')[0]}; what was judged is kept: start the run again"
        )
    found = iter(judge.settle(answers) if without else verdicts.found)
    return [0.0 if rollout.answer is None else next(found) for _, rollout in rollouts]


@functools.cache
def _judge(config: RewardJudgeConfig) -> AnswerJudge:
    return AnswerJudge(config, Path(config.store))
