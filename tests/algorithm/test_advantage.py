import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.algorithm.advantage import group_advantages, has_spread, unit_advantages
from tests.fakes_groups import make_group

rewards = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_known_numbers():
    """mean 1/4, sample standard deviation 1/2."""
    found = group_advantages(make_group([1.0, 0.0, 0.0, 0.0]))
    assert found == pytest.approx([0.75 / 0.500001] + [-0.25 / 0.500001] * 3, abs=1e-12)


@given(rewards)
def test_sum_to_zero_and_keep_the_order_of_rewards(values):
    found = group_advantages(make_group(values))
    assert len(found) == len(values)
    assert math.fsum(found) == pytest.approx(0.0, abs=1e-9)
    assert all((a <= b) for r, a in zip(values, found) for s, b in zip(values, found) if r < s)


@pytest.mark.parametrize("values", [[0.3], [0.1, 0.1, 0.1], [0.0, 0.0], [1.0] * 5])
def test_without_spread_exactly_zero(values):
    assert group_advantages(make_group(values)) == [0.0] * len(values)
    assert not has_spread(make_group(values))


@given(rewards, st.data())
def test_infrastructure_failures_leave_the_baseline(values, data):
    """The others get what they would get without the failed ones."""
    failed = tuple(data.draw(st.sets(st.integers(0, len(values) - 1))))
    found = group_advantages(make_group(values, failed=failed))
    survivors = [value for index, value in enumerate(values) if index not in failed]
    expected = group_advantages(make_group(survivors)) if survivors else []
    assert [found[i] for i in range(len(values)) if i not in failed] == expected
    assert all(found[i] == 0.0 for i in failed)


def test_unscored_rollout_is_an_error():
    import dataclasses

    group = make_group([1.0, 0.0])
    group = dataclasses.replace(
        group, rollouts=(group.rollouts[0], dataclasses.replace(group.rollouts[1], scores=None))
    )
    with pytest.raises(ValueError, match="rollout 1 of question q has no scores"):
        group_advantages(group)


def test_stored_rollouts_count_the_same_whatever_they_earned():
    assert unit_advantages(make_group([1.0, 0.0, 0.5], failed=(1,))) == [1.0, 0.0, 1.0]
