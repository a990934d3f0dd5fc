"""Softmax of rows by hand."""

import pytest
import torch

from megatron_sd.ops.row_softmax import RowSoftmax


@pytest.mark.parametrize(
    ("logits", "entropy", "gradient"),
    [((0.0, 0.0), 0.6931, (0.0, 0.0)), ((3.0, 1.0), 0.5623, (-0.2060, 0.2060))],
)
def test_entropy_and_its_gradient(logits, entropy, gradient):
    """Logits ln 3 and 0: p is (3/4, 1/4)."""
    rows, targets = torch.tensor([logits]).log() if logits[0] else torch.zeros(1, 2), torch.tensor([0])
    found = RowSoftmax.of(rows, 1.0, targets)
    assert found.entropies.item() == pytest.approx(entropy, abs=1e-4)
    slopes = found.gradient(torch.zeros(1), targets, 1.0, entropy_slopes=torch.ones(1))
    assert slopes[0].tolist() == pytest.approx(gradient, abs=1e-4)


def test_a_probability_of_zero_has_no_entropy_gradient():
    targets = torch.tensor([1])
    found = RowSoftmax.of(torch.tensor([[-torch.inf, 0.0, 0.0]]), 0.5, targets)
    gradient = found.gradient(torch.ones(1), targets, 0.5, entropy_slopes=torch.ones(1))
    assert gradient[0].tolist() == pytest.approx([0.0, 1.0, -1.0])
