"""What an estimator of advantages is, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup

STD_EPSILON = 1e-6

TurnAdvantages = tuple[float, ...]  # one number a turn of a rollout
GroupAdvantages = list[TurnAdvantages]  # of a group's rollouts, in index order
# From all scored groups of a step to theirs. Infrastructure failures are as if absent, and get zeros.
Estimator = Callable[[Sequence[RolloutGroup], AdvantageConfig], list[GroupAdvantages]]


def reward_of(rollout: Rollout, terms: Mapping[str, float]) -> float:
    """The weighted sum of the rollout's scores that `terms` names; hops that are unknown count 0. Raises
    ValueError for a rollout that nobody scored."""
    if rollout.scores is None:
        raise ValueError(
            f"rollout {rollout.index} of question {rollout.question_id} has no scores: score the groups first"
        )
    scores = rollout.scores
    known = {name: scores.own.get(name, getattr(scores, name, None)) for name in terms}
    return sum(weight * (known[name] or 0.0) for name, weight in terms.items())


def rewards_of(group: RolloutGroup, terms: Mapping[str, float]) -> list[float]:
    """Of the usable rollouts, in index order."""
    return [reward_of(rollout, terms) for rollout in group.usable]


def relative(values: Sequence[float], *, scaled: bool) -> list[float]:
    """The values less their mean, with `scaled` over their sample deviation (divisor n - 1) + 1e-6; exactly 0
    where all are equal, or one is alone."""
    if len(values) < 2 or min(values) == max(values):
        return [0.0] * len(values)
    mean = fmean(values)
    scale = stdev(values) + STD_EPSILON if scaled else 1.0
    return [(value - mean) / scale for value in values]


def over_turns(group: RolloutGroup, numbers: Sequence[float]) -> GroupAdvantages:
    """Each usable rollout's number in each of its turns; zeros for the other rollouts."""
    own = dict(zip((rollout.index for rollout in group.usable), numbers, strict=True))
    return [(own.get(rollout.index, 0.0),) * len(rollout.turns) for rollout in group.rollouts]
