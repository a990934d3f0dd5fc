"""The head's products with float32 results: exact to float32's rounding, from bfloat16 inputs."""

import torch
import torch.nn.functional as F  # noqa: N812

from megatron_sd.ops.head.products import add_outer_product, head_logits


def test_products_in_parts_are_unrounded(monkeypatch):
    monkeypatch.setattr("megatron_sd.ops.head.products.PART", 20)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((11, 16), (53, 16), (53,))
    )
    exact = F.linear(hidden.double(), weight.double(), bias.double())
    found = head_logits(hidden, weight, bias, unrounded=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert head_logits(hidden, weight, bias, unrounded=False).dtype == torch.bfloat16
    total, gradient = torch.ones(53, 16), exact.bfloat16()
    add_outer_product(total, gradient, hidden, is_first=False)
    torch.testing.assert_close(
        total.double(), 1 + gradient.double().t() @ hidden.double(), rtol=1e-5, atol=1e-5
    )
    overwritten = torch.full_like(total, torch.nan)
    add_outer_product(overwritten, gradient, hidden, is_first=True)
    torch.testing.assert_close(overwritten, total - 1, rtol=1e-5, atol=1e-5)
    add_outer_product(overwritten, gradient[:0], hidden[:0], is_first=True)
    assert torch.count_nonzero(overwritten) == 0


def test_of_one_dtype_the_first_product_is_written_over_what_was_there():
    gradient, hidden = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(2, 4)
    total = torch.full((3, 4), torch.nan)
    add_outer_product(total, gradient, hidden, is_first=True)
    assert torch.equal(total, gradient.t() @ hidden)
    add_outer_product(total, gradient, hidden, is_first=False)
    assert torch.equal(total, 2 * (gradient.t() @ hidden))
