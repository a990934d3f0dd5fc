"""StepSearch's rewards of single searches: what a search found anew, less what it found again."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, reward_of
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup


def stepsearch(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """G_ik less the mean of the other rollouts' G at the same turn number, where G_ik is the rollout's reward
    plus config.step_scale times its step rewards from turn k on (after StepSearch, arXiv 2505.15107).

    Alone at its turn number: 0. Questions without supporting passages have no step rewards. The authors
    train a critic (PPO) instead of comparing rollouts, and measure gain by TF-IDF similarity to the
    supporting passages' texts; here it is the share of hops that are newly served.
    """
    return [_of_group(group, config) for group in groups]


def step_rewards(rollout: Rollout, supporting: Sequence[Sequence[str]]) -> list[float]:
    """One a turn: the share of hops that it serves for the first time, less the share of its passages that
    were found before, in an earlier turn or earlier in this one. Zeros where the hops are unknown."""
    if not supporting:
        return [0.0] * len(rollout.turns)
    seen: set[str] = set()
    served: set[int] = set()
    rewards = []
    for turn in rollout.turns:
        ids = [hit.passage.id for hit in turn.hits]
        repeated = sum(id_ in seen or id_ in ids[:place] for place, id_ in enumerate(ids))
        seen.update(ids)
        now = {hop for hop, passages in enumerate(supporting) if not seen.isdisjoint(passages)}
        rewards.append(len(now - served) / len(supporting) - repeated / max(len(ids), 1))
        served = now
    return rewards


def returns(rollout: Rollout, supporting: Sequence[Sequence[str]], config: AdvantageConfig) -> list[float]:
    """G of every turn."""
    found: list[float] = []
    ahead = reward_of(rollout, config.terms)
    for reward in reversed(step_rewards(rollout, supporting)):
        ahead += config.step_scale * reward
        found.append(ahead)
    return found[::-1]


def _of_group(group: RolloutGroup, config: AdvantageConfig) -> GroupAdvantages:
    own = {rollout.index: returns(rollout, group.question.supporting, config) for rollout in group.usable}
    found = []
    for rollout in group.rollouts:
        numbers = []
        for k in range(len(rollout.turns)):
            others = [g[k] for index, g in own.items() if index != rollout.index and k < len(g)]
            is_compared = rollout.index in own and others
            numbers.append(own[rollout.index][k] - fmean(others) if is_compared else 0.0)
        found.append(tuple(numbers))
    return found
