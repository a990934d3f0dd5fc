"""Which of the sampled groups make a step: all, or those with something to learn from, sampled until there are
enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from megatron_sd.config import RolloutConfig
from megatron_sd.errors import NothingKeptError
from megatron_sd.records import RolloutGroup

# Scored groups of all ranks, alike on all, by round: 0 first.
SampleAll = Callable[[int], list[RolloutGroup]]
Keeper = Callable[[RolloutGroup, RolloutConfig], bool]


def with_spread(group: RolloutGroup, _: RolloutConfig) -> bool:
    """Some rollouts are right and some are not, by exact match (DAPO, arXiv 2503.14476, equation 11). What a
    shaped reward tells apart does not count."""
    return len(set(_successes(group))) > 1


def in_range(group: RolloutGroup, config: RolloutConfig) -> bool:
    """The share of right rollouts lies in config.keep_range, its ends included."""
    own, (low, high) = _successes(group), config.keep_range
    return bool(own) and low <= fmean(own) <= high


def _successes(group: RolloutGroup) -> list[float]:
    return [rollout.scores.em for rollout in group.usable if rollout.scores is not None]


KEEPERS: Mapping[str, Keeper] = {
    "all": lambda group, config: True,
    "with_spread": with_spread,
    "in_range": in_range,
}


@dataclass
class Collecting:
    """Finds a step's groups. config.keep_groups `all` takes what the first round gives, whatever it is."""

    config: RolloutConfig
    _counts: dict[str, float] = field(default_factory=dict)

    def __call__(self, sample: SampleAll) -> list[RolloutGroup]:
        """config.questions_per_step groups that are kept, in the order in which they were sampled; fewer after
        config.max_resamples further rounds. A question that a round asks again is not kept twice.
        Raises NothingKeptError when none is kept."""
        if self.config.keep_groups == "all":
            return sample(0)
        keeps, wanted = KEEPERS[self.config.keep_groups], self.config.questions_per_step
        kept: dict[str, RolloutGroup] = {}
        num_sampled = num_rounds = 0
        while len(kept) < wanted and num_rounds <= self.config.max_resamples:
            groups = sample(num_rounds)
            num_sampled += len(groups)
            for group in groups:
                if keeps(group, self.config):
                    kept.setdefault(group.question.id, group)
            num_rounds += 1
        self._counts = {
            "rollout/sampled_groups": float(num_sampled),
            "rollout/kept_share": len(kept) / max(num_sampled, 1),
        }
        if not kept:
            raise NothingKeptError(
                f"none of {num_sampled} groups is kept by rollout.keep_groups {self.config.keep_groups} after"
                f" {num_rounds} rounds (rollout.max_resamples {self.config.max_resamples})"
            )
        return list(kept.values())[:wanted]

    def metrics(self) -> Mapping[str, float]:
        """Of the last step, by TensorBoard name; none where all groups are taken."""
        return self._counts
