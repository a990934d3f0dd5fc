"""A small sample of every trust test (tests/trust), with real ranks; `make trust` runs full counts and
writes docs/trust.md."""

from random import Random

import pytest

from tests.nursery import nursery
from tests.trust import disk, faults, kills, resize
from tests.trust.rows import Bench, make_small_world

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
TIMEOUT_S = 12.0  # of the watchdog: a step may take a few seconds on a busy machine


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trust")
    world = make_small_world(directory / "world")
    return Bench(directory=directory, world=world, nursery=nursery(), random=Random(0))


def check(row):
    assert row.passed == row.count > 0, "\n".join(row.failures)


def test_r1_killed_at_random_moments(bench):
    check(kills.kills(bench, count=3))


def test_r2_a_disk_that_fails_in_a_save(bench):
    check(disk.faults(bench, stride=9))


def test_r2_killed_in_a_save(bench):
    check(disk.killed_commits(bench, stride=25))


def test_r3_killed_and_resumed_equals_straight(bench):
    check(kills.straight_or_killed(bench, stages=(3,), steps=4))


def test_r3_other_ranks_and_other_stages(bench):
    check(resize.resized(bench, cases=resize.CASES[1:3]))


def test_r4_damage_is_found(bench):
    # of R3 above, in this process or not
    checkpoint = bench.directory / "straight3" / "checkpoints" / "step_00000004"
    if not checkpoint.exists():
        check(kills.straight_or_killed(bench, stages=(3,), steps=4))
    check(disk.damages(bench, checkpoint, offsets=3))


def test_r5_asked_to_stop_at_random_moments(bench):
    check(kills.stops(bench, count=3))


def test_r7_a_rank_that_is_stuck(bench):
    check(faults.stuck_ranks(bench, kinds=("stuck",), places=("rollout",), at=(1,), timeout_s=TIMEOUT_S))


def test_r8_not_finite_on_one_rank(bench):
    check(faults.not_finite(bench, stages=(3,)))


def test_r8_refused_steps(bench):
    check(faults.refusals(bench, names=("three",)))


def test_r9_spikes():
    check(faults.spikes(steps=10_000, num_spikes=20))
