"""Rollout groups with given rewards."""

from __future__ import annotations

from megatron_sd.records import Question, Rollout, RolloutGroup, Scores, StopReason, Turn


def make_rollout(
    reward: float, *, index: int = 0, turns: tuple[Turn, ...] | None = None, failed: bool = False
) -> Rollout:
    return Rollout(
        question_id="q",
        index=index,
        prompt_ids=(1, 2, 3),
        turns=(Turn(completion_ids=(4, 5), completion_logprobs=(-1.0, -2.0)),) if turns is None else turns,
        stop_reason=StopReason.RETRIEVAL_FAILED if failed else StopReason.ANSWERED,
        scores=Scores(reward=reward, em=float(reward == 1), f1=reward, format_valid=1.0),
    )


def make_group(rewards: list[float], *, failed: tuple[int, ...] = ()) -> RolloutGroup:
    rollouts = tuple(make_rollout(r, index=i, failed=i in failed) for i, r in enumerate(rewards))
    return RolloutGroup(question=Question(id="q", text="?", golden_answers=("a",)), rollouts=rollouts)
