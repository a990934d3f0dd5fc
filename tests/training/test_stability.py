"""Steps that are refused, and norms that are spikes; with real ranks in test_trust.py."""

import math

import pytest

from megatron_sd.config import AlphaConfig, SafetyConfig
from megatron_sd.errors import BarrenStepError, GradientSpikeError, NonFiniteError
from megatron_sd.training.safety.stability import MIN_NORMS, SpikeGuard, Stability
from megatron_sd.training.teacher_side.gradient_ratio import AlphaSchedule, GradientRatio

ERROR = NonFiniteError("the loss of rank 1 is not finite")


def test_three_refusals_go_back_and_five_end_the_run():
    stability = Stability(SafetyConfig())
    assert [stability.refused(step, ERROR) for step in (7, 8, 9)] == [False, False, True]
    for step in (5, 6):  # repeated after going back: they prove nothing
        stability.taken(step, 1.0)
    assert stability.refused(7, ERROR) is False
    with pytest.raises(NonFiniteError, match="the loss of rank 1 is not finite. 5 steps were refused"):
        stability.refused(8, ERROR)


def test_a_new_sound_step_ends_the_count():
    stability = Stability(SafetyConfig(roll_back_after_refusals=2))
    assert [stability.refused(7, ERROR), stability.refused(8, ERROR)] == [False, True]
    for step in range(5, 10):
        stability.taken(step, 1.0)
    assert [stability.refused(10, ERROR), stability.refused(11, ERROR)] == [False, True]


def test_barren_steps_are_passed_over_and_several_in_a_row_end_the_run():
    """The weights are not to blame: no going back, and advice that fits."""
    stability, barren = (
        Stability(SafetyConfig()),
        BarrenStepError("none of the step's 8 rollouts has a sampled token"),
    )
    assert [stability.refused(step, barren) for step in (3, 4, 5, 6)] == [False] * 4
    stability.taken(7, 1.0)
    assert [stability.refused(step, barren) for step in (8, 9, 10, 11)] == [False] * 4
    with pytest.raises(
        BarrenStepError, match="5 steps were refused .*look at what prompts .*rollout.max_rollout_tokens"
    ):
        stability.refused(12, barren)


def test_a_run_none_of_whose_steps_was_taken_does_not_end_well():
    """Fewer steps than stop_after_refusals: it would look trained."""
    barren = BarrenStepError("none of the step's 8 rollouts has a sampled token")
    stability = Stability(SafetyConfig())
    stability.refuse_to_end()  # nothing was left to do
    stability.refused(0, barren)
    with pytest.raises(
        BarrenStepError, match="sampled token. No step of this run was taken: look at what prompts"
    ):
        stability.refuse_to_end()
    stability.taken(1, 1.0)
    stability.refuse_to_end()


def test_the_error_keeps_its_kind():
    stability = Stability(SafetyConfig(stop_after_refusals=1))
    with pytest.raises(GradientSpikeError):
        stability.refused(0, GradientSpikeError("large"))


def test_a_spike_is_judged_by_the_log_norms_before_it():
    guard = SpikeGuard(sigmas=5.0, window=32)
    for step in range(MIN_NORMS):
        assert guard.limit() == math.inf
        guard.accept(math.exp(0.1 if step % 2 else -0.1))
    assert guard.limit() == pytest.approx(math.exp(5 * 1.4826 * 0.1))
    guard.accept(0.0)
    assert len(guard.state()) == MIN_NORMS, "no gradient, no scale"
    for _ in range(40):
        guard.accept(2.0)
    assert len(guard.state()) == 32
    assert guard.limit() == pytest.approx(2.0 * math.exp(5 * 0.05)), (
        "equal norms do not make a difference of 1 % a spike"
    )
    other = SpikeGuard(sigmas=5.0, window=32)
    other.load_state(guard.state())
    assert other.limit() == guard.limit()
    assert SpikeGuard(sigmas=0.0, window=32).limit() == math.inf


def test_a_measurement_that_is_not_finite_does_not_change_alpha():
    schedule = AlphaSchedule(
        config=AlphaConfig(mode="grad_ratio", warmup_steps=0), measure_every=1, unit_ratio=2.0
    )
    for products in ((math.nan, 1.0, 0.0, 0.0), (1.0, math.inf, 0.0, 0.0)):
        assert schedule.after(GradientRatio.of(0.1, products)) == schedule
