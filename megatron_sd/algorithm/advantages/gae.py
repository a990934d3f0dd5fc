"""PPO's advantages: what a turn earned, and from that and a critic's values a number for each sampled token.

Observations are as if they were not there: a sampled token is followed by the next sampled token of its
rollout, whatever the environment appended in between (as newer verl has it). Search-R1's code runs over
observations, too, and so lets values of passages into the sum wherever lam is below 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, reward_of
from megatron_sd.algorithm.advantages.stepsearch import step_rewards
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup

WHITEN_EPSILON = 1e-8


def gae(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """What each turn earned, not yet an advantage: `generalized` makes one of it when the critic has been
    read.

    The rollout's reward stands in its last turn that has a sampled token; config.turn_rewards adds those of
    single searches. A group's rollouts are not compared, so one a question will do."""
    return [
        [
            (0.0,) * len(rollout.turns)
            if rollout.stop_reason.is_infrastructure
            else _earned(rollout, group, config)
            for rollout in group.rollouts
        ]
        for group in groups
    ]


def _earned(rollout: Rollout, group: RolloutGroup, config: AdvantageConfig) -> tuple[float, ...]:
    own = [0.0] * len(rollout.turns)
    if config.turn_rewards == "stepsearch":
        own = [config.step_scale * earned for earned in step_rewards(rollout, group.question.supporting)]
    sampled = [number for number, turn in enumerate(rollout.turns) if turn.completion_ids]
    if sampled:
        own[sampled[-1]] += reward_of(rollout, config.terms)
    return tuple(own)


def token_rewards(by_turn: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[T] float64: the reward of a turn at its last token, 0 at all others. by_turn: [T], a turn's reward at
    each of its tokens; turns: [T], equal within a turn."""
    is_last = np.append(turns[1:] != turns[:-1], np.ones(min(len(turns), 1), dtype=bool))
    return np.where(is_last, by_turn, 0.0).astype(np.float64)


def generalized(rewards: np.ndarray, values: np.ndarray, *, gamma: float, lam: float) -> np.ndarray:
    """[T] float64 advantages of one rollout's sampled tokens, in order (Schulman et al., arXiv 1506.02438,
    equation 16): d_t = r_t + gamma V_(t+1) - V_t, A_t = d_t + gamma lam A_(t+1), with nothing after the last.
    rewards, values: [T] float64."""
    advantages = np.zeros(len(rewards))
    ahead, value_ahead = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        ahead = rewards[t] + gamma * value_ahead - values[t] + gamma * lam * ahead
        advantages[t], value_ahead = ahead, values[t]
    return advantages
