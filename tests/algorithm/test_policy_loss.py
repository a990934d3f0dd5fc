import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.algorithm.distill_loss import TermWeights, query_row_weights
from megatron_sd.algorithm.policy_loss import POLICY_LOSSES, policy_rows


def rows(ratio, advantage, reference=None, clip=0.2, importance_cap=None):
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    known = torch.tensor([-1.0], dtype=torch.float64)
    reference = None if reference is None else torch.tensor([reference], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return logprob, policy_rows(
        logprob, known, advantages, reference, clip=clip, importance_cap=importance_cap
    )


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
    kl = policy_rows(logprob, zero, zero, torch.tensor([reference], dtype=torch.float64), clip=0.2).kl
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
    found = POLICY_LOSSES["likelihood"](logprob, known, advantages, None, clip=0.2)
    found.losses.sum().backward()
    assert found.losses.item() == pytest.approx(-advantage * now, abs=1e-12)
    assert logprob.grad.item() == pytest.approx(-advantage, abs=1e-12), (
        "however far the policy has moved from who sampled"
    )
    assert (found.kl.item(), found.clipped.item()) == (0, 0)
    assert found.logprob_gap.item() == pytest.approx(abs(now + 1.0), abs=1e-12)
