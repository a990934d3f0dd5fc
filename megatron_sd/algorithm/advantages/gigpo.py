"""GiGPO: beside the rollout's advantage, one for each turn among the turns that stood in the same place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, relative, rewards_of
from megatron_sd.algorithm.advantages.states import STATES
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import RolloutGroup


def gigpo(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """A_ik = A_i + w A_ik^S (GiGPO, arXiv 2505.10978, equations 3 to 8).

    A_i: the reward less the group's mean. The return of turn k is discount^(K - 1 - k) r_i, the reward
    standing on the last turn; A_ik^S: it, less the mean of the turns of the group that stand in the same
    place (states.py); alone there: 0. normalize mean_std divides both by sample deviation + 1e-6. w:
    config.weight.

    The authors' code takes the rollouts' mean over turns, so that long rollouts count more; here every
    rollout counts once.
    """
    return [_of_group(group, config) for group in groups]


def _of_group(group: RolloutGroup, config: AdvantageConfig) -> GroupAdvantages:
    rollouts = group.usable
    rewards, scaled = rewards_of(group, config.terms), config.normalize == "mean_std"
    whole = relative(rewards, scaled=scaled)
    members: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)  # (rollout, turn) by place
    for i, places in enumerate(STATES[config.state](rollouts)):
        for k in range(len(rollouts[i].turns)):
            members[places[k]].append((i, k))
    by_turn: dict[tuple[int, int], float] = {}
    for turns in members.values():
        returns = [config.discount ** (len(rollouts[i].turns) - 1 - k) * rewards[i] for i, k in turns]
        by_turn |= zip(turns, relative(returns, scaled=scaled), strict=True)
    own = {
        rollout.index: tuple(whole[i] + config.weight * by_turn[i, k] for k in range(len(rollout.turns)))
        for i, rollout in enumerate(rollouts)
    }
    return [own.get(rollout.index, (0.0,) * len(rollout.turns)) for rollout in group.rollouts]
