"""The estimators by name: from a step's scored groups to one number a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_sd.algorithm.advantages import from_rewards
from megatron_sd.algorithm.advantages.estimator import Estimator, GroupAdvantages
from megatron_sd.algorithm.advantages.gae import gae
from megatron_sd.algorithm.advantages.gigpo import gigpo
from megatron_sd.algorithm.advantages.graph_hca import graph_hca
from megatron_sd.algorithm.advantages.mr_search import mr_search
from megatron_sd.algorithm.advantages.stepsearch import stepsearch

ADVANTAGES: Mapping[str, Estimator] = {
    "grpo": from_rewards.grpo,
    "dr_grpo": from_rewards.dr_grpo,
    "rloo": from_rewards.rloo,
    "reinforce_baseline": from_rewards.reinforce_baseline,
    "max_rl": from_rewards.max_rl,
    "batch_std": from_rewards.batch_std,
    "gdpo": from_rewards.gdpo,
    "gigpo": gigpo,
    "graph_hca": graph_hca,
    "stepsearch": stepsearch,
    "mr_search": mr_search,
    "gae": gae,
    "one": from_rewards.one,
}
FROM_VALUES = frozenset({"gae"})  # estimators whose numbers become advantages when a critic has been read


def any_advantage(advantages: GroupAdvantages) -> bool:
    """Some number of the group is not 0."""
    return any(number != 0.0 for numbers in advantages for number in numbers)


def every_rollout(_: GroupAdvantages) -> bool:
    """Rewards less a critic's values are hardly ever 0, however equal the rewards."""
    return True


def gradient_test(estimator: str) -> Callable[[GroupAdvantages], bool]:
    """Says of a group's numbers whether the policy loss will have a gradient there."""
    return every_rollout if estimator in FROM_VALUES else any_advantage
