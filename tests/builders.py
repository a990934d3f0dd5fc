"""Small records for tests, built in one line each."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sd.records import (
    SEARCH,
    Action,
    Hit,
    Passage,
    Question,
    Rollout,
    RolloutGroup,
    Scores,
    StopReason,
    Turn,
)


def question(
    number: int = 0, answers: Sequence[str] = ("gold",), supporting: Sequence[Sequence[str]] = ()
) -> Question:
    return Question(
        id=f"q{number}",
        text=f"Question {number}?",
        golden_answers=tuple(answers),
        supporting=tuple(tuple(hop) for hop in supporting),
    )


def hit(passage_id: str, text: str = "text", title: str = "Title", score: float = 1.0) -> Hit:
    return Hit(passage=Passage(id=passage_id, title=title, text=text), score=score)


def scores(reward: float) -> Scores:
    return Scores(reward=reward, em=float(reward == 1.0), f1=reward, format_valid=1.0)


def rollout(
    index: int = 0,
    queries: Sequence[str] = (),
    reward: float | None = None,
    stop_reason: StopReason = StopReason.ANSWERED,
    answer: str | None = None,
    number: int = 0,
) -> Rollout:
    """A rollout that searched for `queries` (three completion tokens a turn, the middle one the query) and
    then answered."""
    turns = [
        Turn(
            completion_ids=(5, 10 + i, 6),
            completion_logprobs=(-0.1, -0.2, -0.3),
            observation_ids=(7, 8),
            action=Action(tool=SEARCH, text=q, span=(1, 2)),
        )
        for i, q in enumerate(queries)
    ]
    turns.append(Turn(completion_ids=(9, 2), completion_logprobs=(-0.5, -0.6)))
    return Rollout(
        question_id=f"q{number}",
        index=index,
        prompt_ids=(1, 3, 4),
        turns=tuple(turns),
        stop_reason=stop_reason,
        answer=answer,
        scores=None if reward is None else scores(reward),
    )


def group(rollouts: Sequence[Rollout], number: int = 0) -> RolloutGroup:
    return RolloutGroup(question=question(number), rollouts=tuple(rollouts))
