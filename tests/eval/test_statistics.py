"""Intervals and tests against scipy, statsmodels, and cases worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from eval.statistics import (
    bootstrap_means,
    clustered_bootstrap,
    holm,
    mcnemar,
    paired_bootstrap,
    percentile_interval,
    smallest_detectable_difference,
    wilson,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 3), (37, 125), (20000, 51713)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_that_of_statsmodels(successes, trials, confidence):
    interval = wilson(successes, trials, confidence)
    low, high = proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
    assert interval.value == successes / trials
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert math.isnan(wilson(0, 0).value)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (8, 8), (120, 90), (900, 700)])
def test_mcnemar_is_the_exact_one_of_statsmodels(first, second):
    table = [[50, first], [second, 40]]
    assert mcnemar(first, second) == pytest.approx(reference_mcnemar(table, exact=True).pvalue, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 32)


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.6], [0.02], [], [0.01, 0.01, 0.9]])
def test_holm_is_that_of_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_bootstrap_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=300)
    own = clustered_bootstrap([[value] for value in values], num_resamples=4000, seed=0)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    )
    spread = values.std() / math.sqrt(300)
    assert own.value == pytest.approx(values.mean())
    assert own.low == pytest.approx(reference.confidence_interval.low, abs=0.12 * spread)
    assert own.high == pytest.approx(reference.confidence_interval.high, abs=0.12 * spread)


def test_samples_of_one_question_are_one_draw():
    """Five equal samples a question: the interval is that of the questions, not of five times as many."""
    values = np.random.default_rng(3).integers(2, size=200).astype(float)
    once = clustered_bootstrap([[value] for value in values], num_resamples=1000, seed=0)
    five = clustered_bootstrap([[value] * 5 for value in values], num_resamples=1000, seed=0)
    assert (once.low, once.high) == pytest.approx((five.low, five.high))
    loose = clustered_bootstrap([[value] for value in values for _ in range(5)], num_resamples=1000, seed=0)
    assert (loose.high - loose.low) / (once.high - once.low) == pytest.approx(1 / math.sqrt(5), rel=0.1)


def test_all_resamples_of_two_questions_by_hand():
    """Drawn twice, the first, or one of each, with chances 1/4, 1/4, 1/2; a question without a value adds
    nothing."""
    sums, counts = np.array([[2.0, 1.0], [1.0, 0.0]]), np.array([[2.0, 1.0], [1.0, 0.0]])
    sums[1, 0] = 0.0
    means = bootstrap_means(sums, counts, num_resamples=4000, seed=0)
    assert set(np.round(means[:, 0], 6)) == {1.0, 0.0, round(2 / 3, 6)}
    assert np.mean(means[:, 0] == 0.0) == pytest.approx(0.25, abs=0.03)
    assert np.isnan(means[:, 1]).mean() == pytest.approx(0.25, abs=0.03)
    assert percentile_interval(1.0, means[:, 1]).low == 1.0
    assert math.isnan(clustered_bootstrap([[], []], num_resamples=10, seed=0).value)


def test_paired_bootstrap_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(4)
    first = rng.normal(size=400)
    second = first + 0.1 + 0.2 * rng.normal(size=400)
    found = paired_bootstrap(first, second, num_resamples=2000, seed=0)
    half = 1.96 * (second - first).std() / 20
    assert found.value == pytest.approx((second - first).mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.15 * half)
    assert found.p_value == pytest.approx(2 / 2001)
    none = paired_bootstrap(first, first, num_resamples=200, seed=0)
    assert (none.value, none.low, none.high, none.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_p_values_of_the_bootstrap_agree_with_a_t_test():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 150))
    second = second + 0.15
    expected = stats.ttest_rel(second, first).pvalue
    assert paired_bootstrap(first, second, num_resamples=8000, seed=0).p_value == pytest.approx(
        expected, abs=0.03
    )


def test_smallest_detectable_difference_agrees_with_statsmodels():
    solved = TTestPower().solve_power(nobs=900, alpha=0.05, power=0.8) * 0.45
    assert smallest_detectable_difference(0.45, 900) == pytest.approx(solved, rel=0.005)
    assert smallest_detectable_difference(1.0, 1) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    assert math.isnan(smallest_detectable_difference(1.0, 0))
