"""Two small groups of rollouts: what functions of the user's own are tried with (own_code/)."""

from __future__ import annotations

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


def example_groups() -> list[RolloutGroup]:
    """Two questions with a right and a wrong rollout each, scored: what new functions are tried with."""
    return [_example_group(number) for number in range(2)]


def _example_group(number: int) -> RolloutGroup:
    question = Question(
        id=f"q{number}",
        text="Who guides the mentor of Kalo Miren?",
        golden_answers=("Dava Sul",),
        supporting=(("p1",), ("p2",)),
    )
    answers = ("Dava Sul", "Nira Vo")
    return RolloutGroup(
        question=question,
        rollouts=tuple(_example_rollout(question, index, answer) for index, answer in enumerate(answers)),
    )


def _example_rollout(question: Question, index: int, answer: str) -> Rollout:
    passage = Passage(id="p1", title="Kalo Miren", text="Kalo Miren's mentor is Teno Ruf.")
    searched = Turn(
        completion_ids=(5, 6, 7, 8),
        completion_logprobs=(-0.1, -0.2, -0.3, -0.1),
        observation_ids=(9, 10),
        action=Action(tool=SEARCH, text="mentor of Kalo Miren", span=(1, 3)),
        hits=(Hit(passage=passage, score=1.0),),
    )
    answered = Turn(completion_ids=(11, 12), completion_logprobs=(-0.1, -0.1), answer=answer)
    is_right = float(answer in question.golden_answers)
    return Rollout(
        question_id=question.id,
        index=index,
        prompt_ids=(1, 2, 3, 4),
        turns=(searched, answered),
        stop_reason=StopReason.ANSWERED,
        answer=answer,
        scores=Scores(reward=is_right, em=is_right, f1=is_right, format_valid=1.0, hop_hit_rate=0.5),
    )
