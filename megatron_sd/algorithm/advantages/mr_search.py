"""MR-Search: several answers in one context, each of which earns for the attempts before it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, reward_of
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup


def mr_search(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """C_in = sum over m >= n of discount^(m - n) A_im, for every turn of attempt n (MR-Search, arXiv
    2603.11327).

    A_im: exact match of attempt m, less the mean over the group's other rollouts that made it; alone there:
    0. With one attempt this is RLOO's difference from the others, of rewards.
    """
    return [_of_group(group, config) for group in groups]


def attempt_credits(rewards: Sequence[Sequence[float]], discount: float) -> list[list[float]]:
    """From the rollouts' rewards by attempt to their C. Rollouts may have made unequal numbers of attempts."""
    found = []
    for place, own in enumerate(rewards):
        ahead, credits = 0.0, []
        for m in reversed(range(len(own))):
            others = [other[m] for n, other in enumerate(rewards) if n != place and m < len(other)]
            ahead = (own[m] - fmean(others) if others else 0.0) + discount * ahead
            credits.append(ahead)
        found.append(credits[::-1])
    return found


def _of_group(group: RolloutGroup, config: AdvantageConfig) -> GroupAdvantages:
    rollouts = group.usable
    credits = attempt_credits([_rewards(rollout, config) for rollout in rollouts], config.discount)
    own = {
        rollout.index: tuple(numbers[turn.attempt] for turn in rollout.turns)
        for rollout, numbers in zip(rollouts, credits, strict=True)
    }
    return [own.get(rollout.index, (0.0,) * len(rollout.turns)) for rollout in group.rollouts]


def _rewards(rollout: Rollout, config: AdvantageConfig) -> Sequence[float]:
    """By attempt; of a single one the reward."""
    whole = reward_of(rollout, config.terms)
    by_attempt = () if rollout.scores is None else rollout.scores.em_by_attempt
    return by_attempt or (whole,)
