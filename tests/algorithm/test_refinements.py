"""What is made of a reading before a step's first update. Cases by hand."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from megatron_sd.algorithm.packing.microbatches import build_microbatch
from megatron_sd.algorithm.refinements import (
    Read,
    Reading,
    by_turn,
    hindsight_credit,
    mean_returns,
    minillm,
    most_uncertain,
    refinements,
    turnsight,
    with_old_logprobs,
)
from megatron_sd.config import AdvantageConfig, CriticConfig, PolicyLossConfig, UpdateConfig
from tests.training.fakes import make_samples


def alone(own):
    return [own]


def microbatch(**rows):
    """The rows that are given, and a teacher's for query rows."""
    made = build_microbatch(make_samples(1))
    return dataclasses.replace(made, **{name: np.array(values) for name, values in rows.items()})


def reading(logprobs, entropies=(), teacher=()):
    return Reading(*(np.array(column, np.float32) for column in (logprobs, entropies, teacher)))


def test_what_is_asked_for_decides_what_is_read():
    loss, advantage, update, critic = PolicyLossConfig(), AdvantageConfig(), UpdateConfig(), CriticConfig()
    assert refinements(loss, advantage, update, critic) == ()
    both = PolicyLossConfig(engine_cap=2.0, top_entropy_share=0.2)
    assert len(refinements(both, advantage, update, critic)) == 2
    assert len(refinements(loss, advantage, UpdateConfig(minibatches=2), critic)) == 1
    assert len(refinements(loss, advantage, UpdateConfig(epochs=2), critic)) == 1
    assert len(refinements(loss, AdvantageConfig(modulation="hca"), update, critic)) == 1
    assert len(refinements(loss, AdvantageConfig(estimator="gae"), update, critic)) == 1


def test_ratios_are_to_the_reading_and_the_engine_is_weighed_out():
    """log pi_old - log pi_engine of .9 is cut at 2 (e^.9 = 2.4596); -.5 counts e^-.5 = .6065."""
    m = microbatch(rollout_logprobs=[-1.0, -1.0], old_logprobs=[-1.0, -1.0], advantages=[1.0, -2.0])
    read = [Read(m, reading([-0.1, -1.5]))]
    (found,) = with_old_logprobs(read, alone)
    assert found.old_logprobs.tolist() == pytest.approx([-0.1, -1.5])
    assert found.advantages.tolist() == [1.0, -2.0] and found.rollout_logprobs.tolist() == [-1.0, -1.0]
    (found,) = with_old_logprobs(read, alone, engine_cap=2.0)
    assert found.advantages.tolist() == pytest.approx([2.0, -2.0 * 0.6065], abs=1e-4)


def test_only_the_most_uncertain_tokens_keep_their_advantage():
    """Of ten tokens on two ranks, the two of the highest entropies."""
    m = microbatch(advantages=[1.0, 2.0, 3.0, 4.0, 5.0])
    read = [Read(m, reading([0.0] * 5, [0.1, 0.9, 0.2, 0.3, 0.4]))]
    other = np.array([0.05, 0.8, 0.15, 0.25, 0.35], np.float32)
    (found,) = most_uncertain(read, lambda own: [own, other], share=0.2)
    assert found.advantages.tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    (found,) = most_uncertain(read, lambda own: [own, other], share=1.0)
    assert found.advantages.tolist() == m.advantages.tolist()


def test_turnsight_by_hand():
    """A = 1, d = 1: w 1.3808, A' 1.1904; A = -1, d = 1: w .6192, A' -.8096."""
    found = turnsight(np.array([1.0, -1.0]), np.zeros(2), np.ones(2), config=AdvantageConfig())
    assert found.tolist() == pytest.approx([1.1904, -0.8096], abs=1e-4)
    still = turnsight(
        np.array([1.0, 0.0]), np.zeros(2), np.ones(2), config=AdvantageConfig(modulation_weight=0.0)
    )
    assert still.tolist() == [1.0, 0.0]


def test_hindsight_credit_by_hand():
    """pi .2, h .5, z 1: .6. log h (-1, -2), log pi (-1.5, -2.5): by token e^-.5, .3935. Ratios end at e^2."""
    values = np.array([np.log(0.5 / 0.2), 0.5, -9.0])
    found = hindsight_credit(np.ones(3), values, np.zeros(3), config=AdvantageConfig())
    assert found.tolist() == pytest.approx([0.6, 0.3935, 1.0 - np.exp(2.0)], abs=1e-4)


def test_a_turn_is_weighed_by_its_query_and_measured_against_its_question():
    """Rows 0-2 are turn 0, of which 1 and 2 are its query; row 3 is turn 1 without one; 4 and 5 are turn 2
    and its query. Gains .2 and .6, then 1.0, 1.4 on this rank; another rank's have the mean .8 too."""
    m = microbatch(
        turns=[0, 0, 0, 1, 2, 2], groups=[5] * 6, advantages=[1.0, 1.0, 1.0, 7.0, -1.0, -1.0], query_rows=[1, 2, 4, 5]
    )  # fmt: skip
    logprobs = [0.0, -1.0, -1.0, 0.0, -2.0, -2.0]
    read = [Read(m, reading(logprobs, teacher=[-0.8, -0.4, -1.0, -0.6]))]
    seen = []

    def modulation(advantages, values, standardised, *, config):
        seen.extend([advantages, values, standardised])
        return np.array([10.0, 20.0])

    def everywhere(own):
        assert own.keys() == {5}
        return [own, {5: np.array([2.0, 1.6, 0.8**2 * 2])}]

    (found,) = by_turn(read, everywhere, modulation=modulation, config=AdvantageConfig())
    assert found.advantages.tolist() == [10.0] * 3 + [7.0] + [20.0] * 2
    gains = np.array([0.2, 0.6, 1.0, 1.4, 0.8, 0.8])
    assert seen[0].tolist() == [1.0, -1.0] and seen[1].tolist() == pytest.approx([0.4, 1.2])
    assert seen[2].tolist() == pytest.approx([-0.4 / gains.std(ddof=1), 0.4 / gains.std(ddof=1)], rel=1e-5)


def test_without_a_teacher_or_a_spread_nothing_is_modulated():
    m = microbatch(turns=[0, 0], groups=[1, 1], advantages=[1.0, 1.0], query_rows=[0, 1])
    weigh = partial(by_turn, modulation=turnsight, config=AdvantageConfig())
    (found,) = weigh([Read(m, reading([0.0, 0.0]))], alone)
    assert found is m
    (found,) = weigh([Read(m, reading([0.0, 0.0], teacher=[0.3, 0.3]))], alone)
    assert found.advantages.tolist() == [1.0, 1.0]


def test_minillms_returns_by_hand():
    """Rewards 1, -1, 2: sums from each token on are 2, 1, 2, over 3, 2 and 1 tokens; at .95 1.855, .9, 2."""
    assert mean_returns(np.array([1.0, -1.0, 2.0]), 1.0).tolist() == pytest.approx([2 / 3, 0.5, 2.0])
    assert mean_returns(np.array([1.0, -1.0, 2.0]), 0.95).tolist() == pytest.approx([1.855 / 3, 0.45, 2.0])
    assert mean_returns(np.array([500.0]), 1.0).tolist() == [100.0]


def test_minillm_whitens_over_the_step_and_ends_at_a_rollout():
    """Two rollouts: gains 1, -1, 2 and 3; another rank has one return of 4."""
    m = microbatch(rollouts=[0, 0, 0, 1], advantages=[9.0] * 4, query_rows=[0, 1, 2, 3])
    read = [Read(m, reading([-1.0] * 4, teacher=[0.0, -2.0, 1.0, 2.0]))]
    every = np.array([2 / 3, 0.5, 2.0, 3.0, 4.0])

    def everywhere(own):
        return [own, (4.0 - every.mean()) ** 2 if isinstance(own, float) else np.array([1.0, 4.0])]

    (found,) = minillm(read, everywhere, config=AdvantageConfig(discount=1.0))
    assert found.advantages.tolist() == pytest.approx(
        ((every - every.mean()) / every.std(ddof=1))[:4], rel=1e-5
    )


def test_without_a_teacher_minillm_gives_nothing():
    m = microbatch(rollouts=[0, 0], advantages=[9.0] * 2, query_rows=[0, 1])
    (found,) = minillm([Read(m, reading([-1.0] * 2))], alone, config=AdvantageConfig())
    assert found.advantages.tolist() == [0.0, 0.0]
