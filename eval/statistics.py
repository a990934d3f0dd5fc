"""How sure a figure is, and whether two runs differ: intervals and tests as pure functions of per-question
values.

Questions are the units that were drawn, so they are what is resampled: several rollouts of one question say
the same thing several times, and an interval over rollouts would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its two-sided interval; all NaN when there is nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean paired difference with its bootstrap interval. p_value: two-sided, from the same resamples."""

    value: float
    low: float
    high: float
    p_value: float


def wilson(num_successes: int, num_trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson, 1927): right at 0, at 1 and for few trials, where
    value +- z sd is not."""
    if num_trials == 0:
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), num_successes / num_trials
    scale = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def bootstrap_means(sums: np.ndarray, counts: np.ndarray, *, num_resamples: int, seed: int) -> np.ndarray:
    """[R, F] means of F figures over questions drawn with replacement, the same draw for all figures.

    sums: [N, F] float, each question's values added up; counts: [N, F], how many they are (0: the question
    has none). A mean is sum / count over the drawn questions, NaN when that count is 0: the bootstrap of
    clustered data, a question being a cluster.
    """
    rng = np.random.default_rng(seed)
    num_questions = len(sums)
    totals = np.concatenate([sums, counts], axis=1, dtype=np.float64)
    means = np.empty((num_resamples, sums.shape[1]))
    for row in means:
        drawn = np.bincount(rng.integers(num_questions, size=num_questions), minlength=num_questions)
        total, count = np.split(drawn @ totals, 2)
        row[:] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return means


def percentile_interval(value: float, resampled: np.ndarray, confidence: float = 0.95) -> Interval:
    """The percentile interval of a figure from its bootstrap distribution [R]; NaN resamples are left out."""
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled):
        return Interval(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=value, low=float(low), high=float(high))


def clustered_bootstrap(
    values: Sequence[Sequence[float]], *, num_resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """The mean of all values with its interval over resampled questions. values[q]: what the rollouts of
    question q earned."""
    sums = np.array([[sum(own)] for own in values], dtype=np.float64).reshape(-1, 1)
    counts = np.array([[len(own)] for own in values]).reshape(-1, 1)
    if not counts.sum():
        return Interval(value=math.nan, low=math.nan, high=math.nan)
    means = bootstrap_means(sums, counts, num_resamples=num_resamples, seed=seed)
    return percentile_interval(float(sums.sum() / counts.sum()), means[:, 0], confidence)


def paired_bootstrap(first: np.ndarray, second: np.ndarray, *, num_resamples: int, seed: int) -> Difference:
    """Mean of `second - first`, [N] each, question by question, with its 95 % interval and p-value.

    The p-value doubles the smaller share of resampled means on one side of 0, counting the sample itself,
    so it is never 0.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    ones = np.ones((len(differences), 1))
    means = bootstrap_means(differences[:, None], ones, num_resamples=num_resamples, seed=seed)[:, 0]
    interval = percentile_interval(float(differences.mean()), means)
    smaller = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (smaller + 1) / (num_resamples + 1))
    return Difference(value=interval.value, low=interval.low, high=interval.high, p_value=float(p_value))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: of the questions that exactly one run got right, half are
    expected each.

    only_first, only_second: how many only that run got right. 1.0 when there are none.
    """
    num_discordant = only_first + only_second
    fewer = min(only_first, only_second)
    log_all = num_discordant * math.log(2)
    logs = (
        math.lgamma(num_discordant + 1) - math.lgamma(k + 1) - math.lgamma(num_discordant - k + 1)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * sum(math.exp(log - log_all) for log in logs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm, 1979), in the order given: reject where the adjusted value is
    below the level."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def smallest_detectable_difference(
    spread: float, num_questions: int, *, level: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true mean difference that a two-sided paired test over this many questions finds with
    probability `power`.

    spread: standard deviation of the paired differences, taken as known: (z_{1 - level/2} + z_power) *
    spread / sqrt(N).
    """
    if num_questions == 0:
        return math.nan
    normal = NormalDist()
    return (normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * spread / math.sqrt(num_questions)
