"""The estimators by name: from a step's scored groups to one number a turn."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_sd.algorithm.advantages import from_rewards
from megatron_sd.algorithm.advantages.estimator import Estimator
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
    "one": from_rewards.one,
}
