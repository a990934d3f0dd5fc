import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.algorithm.distill_loss import TermWeights, query_row_weights
from megatron_sd.algorithm.policy_loss import POLICY_LOSSES, KnownRows, policy_rows, sequence_means
from megatron_sd.config import PolicyLossConfig


def rows(ratio, advantage, reference=None, **settings):
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    known = torch.tensor([-1.0], dtype=torch.float64)
    reference = None if reference is None else torch.tensor([reference], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    config = PolicyLossConfig(**settings)
    return logprob, policy_rows(logprob, KnownRows(known, known, advantages, reference), config=config)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # clipped at 1.2
        (0.5, 2.0, -1.0, -1.0, 0),  # worse than before: never clipped
        (1.5, -2.0, 3.0, 3.0, 0),
        (0.5, -2.0, 1.6, 0.0, 1),  # clipped at 0.8
        (1.7, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipped_objective(ratio, advantage, loss, gradient, clipped):
    logprob, found = rows(ratio, advantage)
    assert found.losses.item() == pytest.approx(loss, abs=1e-12)
    found.losses.sum().backward()
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert found.clipped.item() == clipped
    assert found.logprob_gap.item() == pytest.approx(abs(math.log(ratio)))
    assert found.kl.item() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "cut"),
    [
        (1.0, 2.0, 1.0, 0),
        (1.5, 2.0, 1.5, 0),
        (1.5, -2.0, 1.5, 0),
        (3.0, 2.0, 2.0, 1),
        (3.0, -2.0, 2.0, 1),
        (0.1, -2.0, 0.1, 0),
    ],
)
def test_truncated_importance_sampling_bounds_the_weight_of_every_token_and_drops_none(
    ratio, advantage, weight, cut
):
    logprob, found = rows(ratio, advantage, importance_cap=2.0)
    assert found.losses.item() == pytest.approx(-weight * advantage, abs=1e-12)
    found.losses.sum().backward()
    assert logprob.grad.item() == pytest.approx(-weight * advantage, abs=1e-12)
    assert found.clipped.item() == cut
    assert found.logprob_gap.item() == pytest.approx(abs(math.log(ratio)), abs=1e-12)


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k3_is_never_negative_and_its_gradient_vanishes_at_the_reference(now, reference):
    logprob = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    known = KnownRows(zero, zero, zero, torch.tensor([reference], dtype=torch.float64))
    kl = policy_rows(logprob, known, config=PolicyLossConfig()).kl
    ratio = math.exp(reference - now)
    assert kl.item() == pytest.approx(ratio - math.log(ratio) - 1, rel=1e-9, abs=1e-12)
    assert kl.item() >= 0
    kl.sum().backward()
    assert logprob.grad.item() == pytest.approx(1 - ratio, rel=1e-9, abs=1e-12)


def test_query_rows_weigh_by_their_groups_alpha():
    weights = TermWeights(policy=1.0, distill_spread=0.5, distill_no_spread=0.25)
    found = query_row_weights(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([True, True, False]), weights)
    assert found.tolist() == [0.25, 0.25, 0.25]
    assert weights.distils and not TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0).distils


@pytest.mark.parametrize(("now", "advantage"), [(-0.5, 1.0), (-3.0, 1.0), (-1.0, 0.0), (-2.0, -0.5)])
def test_the_likelihood_of_stored_rollouts_knows_no_ratio(now, advantage):
    logprob = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    known, advantages = (
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
    )
    found = POLICY_LOSSES["likelihood"](
        logprob, KnownRows(known, known, advantages), config=PolicyLossConfig()
    )
    found.losses.sum().backward()
    assert found.losses.item() == pytest.approx(-advantage * now, abs=1e-12)
    assert logprob.grad.item() == pytest.approx(-advantage, abs=1e-12), (
        "however far the policy has moved from who sampled"
    )
    assert (found.kl.item(), found.clipped.item()) == (0, 0)
    assert found.logprob_gap.item() == pytest.approx(abs(now + 1.0), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.28, 0.0),
        (1.25, 1.0, -1.25, -1.25),
        (0.5, 1.0, -0.5, -0.5),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_a_higher_clip_above_one_leaves_room_for_unlikely_tokens(ratio, advantage, loss, gradient):
    logprob, found = rows(ratio, advantage, clip_high=0.28)
    assert found.losses.item() == pytest.approx(loss, abs=1e-12)
    found.losses.sum().backward()
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (5.0, -1.0, 3.0, 0.0, 1),
        (2.5, -1.0, 2.5, 2.5, 0),
        (0.5, -1.0, 0.8, 0.0, 1),
        (5.0, 1.0, -1.2, 0.0, 1),
        (5.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_a_dual_clip_bounds_the_loss_of_negative_advantages(ratio, advantage, loss, gradient, clipped):
    logprob, found = rows(ratio, advantage, dual_clip=3.0)
    assert found.losses.item() == pytest.approx(loss, abs=1e-12) and found.clipped.item() == clipped
    found.losses.sum().backward()
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)


@pytest.mark.parametrize(
    ("difference", "k2", "k3"), [(0.2, 0.02, 0.01873), (-0.2, 0.02, 0.02140), (0.0, 0.0, 0.0)]
)
def test_estimates_of_the_kl(difference, k2, k3):
    """The policy's log-probability is log 1.5 - 1; the reference's lies `difference` below it."""
    reference = math.log(1.5) - 1.0 - difference
    for kind, expected in (("k2", k2), ("k3", k3), ("k3_ratio", 1.5 * k3)):
        _, found = rows(1.5, 1.0, reference, kl=kind)
        assert found.kl.item() == pytest.approx(expected, abs=1e-5), kind


def test_gradients_of_the_kl_estimates_are_those_of_the_kl():
    """Summed over all tokens by their probability under the sampling policy, which is another one for k3_ratio."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3)]
    logits, reference, sampling = draw[0].requires_grad_(), draw[1].log_softmax(-1), draw[2].log_softmax(-1)

    def gradient(kind, sampled):
        logprobs = logits.log_softmax(-1)
        known = KnownRows(sampled, sampled, torch.zeros(5), reference)
        found = policy_rows(logprobs, known, config=PolicyLossConfig(kl=kind)).kl
        (own,) = torch.autograd.grad((sampled.exp() * found).sum(), logits)
        return own

    policy = logits.log_softmax(-1)
    (forward,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    own = logits.detach().log_softmax(-1)
    torch.testing.assert_close(gradient("k2", own), forward)
    torch.testing.assert_close(gradient("k3_ratio", sampling), forward)
    (backward,) = torch.autograd.grad((reference.exp() * (reference - logits.log_softmax(-1))).sum(), logits)
    torch.testing.assert_close(gradient("k3", own), backward)


@pytest.mark.parametrize(
    ("advantage", "loss", "gradients"), [(-1.0, 0.9997, (0.0, 0.0)), (1.0, -0.9048, (-0.9048,) * 2)]
)
def test_gspo_clips_by_the_mean_log_ratio_of_the_sequence(advantage, loss, gradients):
    """Log ratios .1 and -.3: both tokens have the ratio exp(-.1), each the gradient of its own
    log-probability."""
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    logprobs = (old + torch.tensor([0.1, -0.3])).requires_grad_()
    means = sequence_means((logprobs - old).detach(), torch.tensor([0, 0]))
    known = KnownRows(old, old, torch.full((2,), advantage), None, means)
    found = policy_rows(logprobs, known, config=PolicyLossConfig(ratio="rollout", clip=3e-4, clip_high=4e-4))
    assert found.losses.tolist() == pytest.approx([loss] * 2, abs=1e-4)
    found.losses.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx(gradients, abs=1e-4)
    assert found.logprob_gap.tolist() == pytest.approx([0.1, 0.3])


def test_means_are_of_the_rows_with_one_number():
    found = sequence_means(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 1, 1, 3]))
    assert found.tolist() == [1.0, 4.0, 4.0, 5.0]
    assert sequence_means(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_ratios_are_against_the_old_policy_and_the_gap_is_to_the_engine():
    logprobs = torch.tensor([-1.0])
    known = KnownRows(torch.tensor([-1.5]), torch.tensor([-1.1]), torch.ones(1))
    found = policy_rows(logprobs, known, config=PolicyLossConfig())
    assert found.losses.item() == pytest.approx(-math.exp(0.1), rel=1e-6)
    assert found.logprob_gap.item() == pytest.approx(0.5)
