"""Advantages from rewards alone: a rollout's number, which each of its turns gets.

r is a rollout's reward; m and s are mean and sample deviation (divisor n - 1) of its group's usable rewards. A
rollout that failed for infrastructure reasons is no data: it is left out of both and gets 0 in every turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup

STD_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8

TurnAdvantages = tuple[float, ...]  # one number a turn of a rollout
GroupAdvantages = list[TurnAdvantages]  # of a group's rollouts, in index order


def reward_of(rollout: Rollout) -> float:
    """The scored reward. Raises ValueError for a rollout that nobody scored."""
    if rollout.scores is None:
        raise ValueError(
            f"rollout {rollout.index} of question {rollout.question_id} has no scores: score the groups first"
        )
    return rollout.scores.reward


def has_spread(group: RolloutGroup) -> bool:
    """The usable rollouts' rewards differ."""
    rewards = [reward_of(rollout) for rollout in group.usable]
    return len(rewards) > 1 and min(rewards) != max(rewards)


def grpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / (s + 1e-6) (GRPO, equation 3). A group without spread, or with one usable rollout, gets zeros.
    A group's usable numbers sum to zero."""
    return [_over_turns(group, _standardised(group)) for group in groups]


def dr_grpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r - m (Dr. GRPO, arXiv 2503.20783); the paper also sums tokens over a constant length."""
    return [_over_turns(group, _centred(group)) for group in groups]


def rloo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r minus the mean of the group's others, n / (n - 1) (r - m) (RLOO, arXiv 2402.14740); alone: 0."""
    found = []
    for group in groups:
        n = len(group.usable)
        found.append(_over_turns(group, [n / max(n - 1, 1) * number for number in _centred(group)]))
    return found


def max_rl(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / m (MaxRL); a group that earned nothing gets zeros."""
    found = []
    for group in groups:
        mean = _mean(group)
        found.append(_over_turns(group, [number / mean if mean else 0.0 for number in _centred(group)]))
    return found


def batch_std(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / (deviation of all the step's usable rewards + 1e-6): TRL's scale_rewards batch, Lite PPO."""
    rewards = [reward_of(rollout) for group in groups for rollout in group.usable]
    deviation = stdev(rewards) if len(rewards) > 1 else 0.0
    scale = 1.0 / (deviation + STD_EPSILON)
    return [_over_turns(group, [scale * number for number in _centred(group)]) for group in groups]


def reinforce_baseline(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r - m, then whitened over the step's sampled tokens, with the unbiased variance (REINFORCE++-baseline,
    arXiv 2501.03262). Zeros where all tokens have one number."""
    centred = [_centred(group) for group in groups]
    weighted = [
        (number, sum(len(turn.completion_ids) for turn in rollout.turns))
        for group, numbers in zip(groups, centred, strict=True)
        for rollout, number in zip(group.rollouts, numbers, strict=True)
        if not rollout.stop_reason.is_infrastructure
    ]
    num_tokens = sum(count for _, count in weighted)
    mean = sum(number * count for number, count in weighted) / max(num_tokens, 1)
    squares = sum((number - mean) ** 2 * count for number, count in weighted)
    deviation = math.sqrt(squares / max(num_tokens - 1, 1))
    if deviation == 0.0:
        return [_over_turns(group, [0.0] * len(group.rollouts)) for group in groups]
    return [
        _over_turns(group, [(number - mean) / (deviation + WHITEN_EPSILON) for number in numbers])
        for group, numbers in zip(groups, centred, strict=True)
    ]


def one(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """1, whatever a rollout earned: of stored rollouts that were selected."""
    return [_over_turns(group, [1.0] * len(group.rollouts)) for group in groups]


def _over_turns(group: RolloutGroup, numbers: Sequence[float]) -> GroupAdvantages:
    """Each rollout's number in each of its turns; 0 for infrastructure failures."""
    return [
        (0.0 if rollout.stop_reason.is_infrastructure else number,) * len(rollout.turns)
        for rollout, number in zip(group.rollouts, numbers, strict=True)
    ]


def _mean(group: RolloutGroup) -> float:
    """m; 0 without a usable rollout."""
    rewards = [reward_of(rollout) for rollout in group.usable]
    return fmean(rewards) if rewards else 0.0


def _centred(group: RolloutGroup) -> list[float]:
    """r - m of every rollout; exactly 0 in a group without spread."""
    if not has_spread(group):
        return [0.0] * len(group.rollouts)
    mean = _mean(group)
    return [_reward_or(mean, rollout) - mean for rollout in group.rollouts]


def _standardised(group: RolloutGroup) -> list[float]:
    """(r - m) / (s + 1e-6) of every rollout; exactly 0 in a group without spread."""
    if not has_spread(group):
        return [0.0] * len(group.rollouts)
    deviation = stdev([reward_of(rollout) for rollout in group.usable])
    return [number / (deviation + STD_EPSILON) for number in _centred(group)]


def _reward_or(instead: float, rollout: Rollout) -> float:
    """The reward; `instead` for an infrastructure failure, which may have none."""
    return instead if rollout.stop_reason.is_infrastructure else reward_of(rollout)


Estimator = Callable[[Sequence[RolloutGroup], AdvantageConfig], list[GroupAdvantages]]
