"""The estimators by name: from a step's scored groups to one number a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_sd.algorithm.advantages import from_rewards
from megatron_sd.algorithm.advantages.estimator import Estimator, GroupAdvantages
from megatron_sd.algorithm.advantages.gae import gae
from megatron_sd.algorithm.advantages.gigpo import gigpo
from megatron_sd.algorithm.advantages.graph_hca import graph_hca
from megatron_sd.algorithm.advantages.mr_search import mr_search
from megatron_sd.algorithm.advantages.stepsearch import stepsearch
from megatron_sd.config import AdvantageConfig
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.seam import Seam, fault_of_number, fault_of_type
from megatron_sd.records import RolloutGroup

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
ESTIMATOR_SEAM = Seam(
    key="advantage.estimator",
    form="estimator(groups, config) -> of each group, of each of its rollouts, a number for each turn",
    table=ADVANTAGES,
    example=lambda: (example_groups(), AdvantageConfig()),
    fault=lambda result, groups, *_: _fault_of_advantages(result, groups),
)
FROM_VALUES = frozenset({"gae"})  # estimators whose numbers become advantages when a critic has been read


def _fault_of_advantages(result: Any, groups: Sequence[RolloutGroup]) -> str | None:
    try:
        found = [[list(numbers) for numbers in own] for own in result]
    except TypeError:
        return fault_of_type(result, list) or "a list of other things than lists of numbers"
    expected = [[len(rollout.turns) for rollout in group.rollouts] for group in groups]
    if [[len(numbers) for numbers in own] for own in found] != expected:
        return f"numbers for {[list(map(len, own)) for own in found]} turns instead of {expected}"
    flat = (number for own in found for numbers in own for number in numbers)
    return next((fault for fault in map(fault_of_number, flat) if fault is not None), None)


def any_advantage(advantages: GroupAdvantages) -> bool:
    """Some number of the group is not 0."""
    return any(number != 0.0 for numbers in advantages for number in numbers)


def every_rollout(_: GroupAdvantages) -> bool:
    """Rewards less a critic's values are hardly ever 0, however equal the rewards."""
    return True


def gradient_test(estimator: str) -> Callable[[GroupAdvantages], bool]:
    """Says of a group's numbers whether the policy loss will have a gradient there."""
    return every_rollout if estimator in FROM_VALUES else any_advantage
