"""Advantages from rewards alone: a rollout's number, which each of its turns gets.

r is a rollout's reward; m and s are mean and sample deviation (divisor n - 1) of its group's usable rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from megatron_sd.algorithm.advantages.estimator import (
    STD_EPSILON,
    GroupAdvantages,
    over_turns,
    relative,
    rewards_of,
)
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import RolloutGroup

WHITEN_EPSILON = 1e-8


def grpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / (s + 1e-6) (GRPO, equation 3). A group without spread, or with one usable rollout, gets zeros.
    A group's usable numbers sum to zero."""
    return [over_turns(group, relative(rewards_of(group, config.terms), scaled=True)) for group in groups]


def dr_grpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r - m (Dr. GRPO, arXiv 2503.20783); the paper also sums tokens over a constant length."""
    return [over_turns(group, relative(rewards_of(group, config.terms), scaled=False)) for group in groups]


def rloo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r minus the mean of the group's others, n / (n - 1) (r - m) (RLOO, arXiv 2402.14740); alone: 0."""
    found = []
    for group in groups:
        centred = relative(rewards_of(group, config.terms), scaled=False)
        share = len(centred) / max(len(centred) - 1, 1)
        found.append(over_turns(group, [share * number for number in centred]))
    return found


def max_rl(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / m (MaxRL); a group that earned nothing gets zeros."""
    found = []
    for group in groups:
        rewards = rewards_of(group, config.terms)
        mean = fmean(rewards) if rewards else 0.0
        centred = relative(rewards, scaled=False)
        found.append(over_turns(group, [number / mean if mean else 0.0 for number in centred]))
    return found


def batch_std(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """(r - m) / (deviation of all the step's usable rewards + 1e-6): TRL's scale_rewards batch, Lite PPO."""
    rewards = [reward for group in groups for reward in rewards_of(group, config.terms)]
    scale = (stdev(rewards) if len(rewards) > 1 else 0.0) + STD_EPSILON
    return [
        over_turns(
            group, [number / scale for number in relative(rewards_of(group, config.terms), scaled=False)]
        )
        for group in groups
    ]


def gdpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """Each of config.terms as GRPO has it, then their weighted sum over the step's deviation, so that a large
    score does not drown a small one (GDPO; TRL's normalize_then_sum). A group's numbers sum to zero."""
    numbers = [
        [
            sum(weight * own for weight, own in zip(config.terms.values(), columns, strict=True))
            for columns in zip(
                *(relative(rewards_of(group, {name: 1.0}), scaled=True) for name in config.terms), strict=True
            )
        ]
        for group in groups
    ]
    every = [number for own in numbers for number in own]
    scale = (stdev(every) if len(every) > 1 else 0.0) + STD_EPSILON
    return [
        over_turns(group, [number / scale for number in own])
        for group, own in zip(groups, numbers, strict=True)
    ]


def reinforce_baseline(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """r - m, then whitened over the step's sampled tokens, with the unbiased variance (REINFORCE++-baseline,
    arXiv 2501.03262). Zeros where all tokens have one number."""
    centred = [relative(rewards_of(group, config.terms), scaled=False) for group in groups]
    weighted = [
        (number, sum(len(turn.completion_ids) for turn in rollout.turns))
        for group, numbers in zip(groups, centred, strict=True)
        for rollout, number in zip(group.usable, numbers, strict=True)
    ]
    num_tokens = sum(count for _, count in weighted)
    mean = sum(number * count for number, count in weighted) / max(num_tokens, 1)
    squares = sum((number - mean) ** 2 * count for number, count in weighted)
    deviation = math.sqrt(squares / max(num_tokens - 1, 1))
    if deviation == 0.0:
        return [over_turns(group, [0.0] * len(group.usable)) for group in groups]
    return [
        over_turns(group, [(number - mean) / (deviation + WHITEN_EPSILON) for number in numbers])
        for group, numbers in zip(groups, centred, strict=True)
    ]


def one(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """1, whatever a rollout earned: of stored rollouts that were selected."""
    return [over_turns(group, [1.0] * len(group.usable)) for group in groups]
