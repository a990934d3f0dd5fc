"""Advantages of a group's rollouts: relative to the group (GRPO), or 1 for each (stored rollouts that were
selected)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean, stdev

from megatron_sd.records import Rollout, RolloutGroup

STD_EPSILON = 1e-6


def reward_of(rollout: Rollout) -> float:
    """The scored reward. Raises ValueError for a rollout that nobody scored."""
    if rollout.scores is None:
        raise ValueError(
            f"rollout {rollout.index} of question {rollout.question_id} has no scores: score the groups first"
        )
    return rollout.scores.reward


def has_spread(group: RolloutGroup) -> bool:
    """The usable rollouts' rewards differ, so that GRPO has a gradient on this group."""
    rewards = [reward_of(rollout) for rollout in group.usable]
    return len(rewards) > 1 and min(rewards) != max(rewards)


def group_advantages(group: RolloutGroup) -> list[float]:
    """(reward - mean) / (std + 1e-6) for every rollout of the group, in index order.

    Mean and standard deviation are over the usable rollouts; std is the sample deviation (divisor n - 1). A
    rollout that failed for infrastructure reasons is no data: it is left out of both and gets 0. A group
    without spread, or with one usable rollout, gets zeros. The usable advantages sum to zero.
    """
    if not has_spread(group):
        return [0.0] * len(group.rollouts)
    rewards = [reward_of(rollout) for rollout in group.usable]
    mean, deviation = fmean(rewards), stdev(rewards)
    return [
        0.0
        if rollout.stop_reason.is_infrastructure
        else (reward_of(rollout) - mean) / (deviation + STD_EPSILON)
        for rollout in group.rollouts
    ]


def unit_advantages(group: RolloutGroup) -> list[float]:
    """1 for every rollout that is data, whatever it earned; 0 for infrastructure failures."""
    return [float(not rollout.stop_reason.is_infrastructure) for rollout in group.rollouts]


Advantages = Callable[[RolloutGroup], list[float]]
ADVANTAGES: Mapping[str, Advantages] = {"group": group_advantages, "one": unit_advantages}
