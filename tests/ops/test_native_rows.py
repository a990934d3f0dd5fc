"""The CPU library beyond the door: steps for shards, factors, differences, gradients in place or in another
dtype."""

from dataclasses import replace

import pytest
import torch

from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.ops.native import calls, cpu_library
from megatron_sd.ops.native.structs import NATIVE_DIVERGENCES
from tests.ops.divergences import JSD, each_of

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)

BF16, FP32 = torch.bfloat16, torch.float32
each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16])
SKEWED = replace(JSD, beta=0.3, temperature=0.8)
each_divergence = each_of(NATIVE_DIVERGENCES, like=SKEWED)


def pair(num_rows=4, vocabulary=1300, *, dtype=FP32, distance=0.5):
    generator = torch.Generator().manual_seed(1)
    student = 3.0 * torch.randn(num_rows, vocabulary, generator=generator)
    return student.to(dtype), (
        student + distance * torch.randn(num_rows, vocabulary, generator=generator)
    ).to(dtype)


def exact(student, teacher, divergence):
    student = student.double().requires_grad_()
    values = divergence_rows(student, teacher.double(), divergence).values
    values.sum().backward()
    return values.detach(), student.grad


def everything(student, teacher, divergence=SKEWED, *, rows=None, **options):
    rows = rows or (torch.arange(len(student)),) * 2
    return calls.native_divergence(
        student, teacher, *rows, divergence=divergence, with_gradient=True, **options
    )


@each_divergence
@each_dtype
def test_shards_add_up_to_the_whole(divergence, dtype):
    student, teacher = pair(dtype=dtype)
    rows = torch.tensor([3, 0, 1]), torch.tensor([3, 0, 1])
    parts = [(student[:, s], teacher[:, s]) for s in (slice(0, 513), slice(513, 520), slice(520, 1300))]
    normalisers = torch.stack(
        [calls.jsd_normalisers(*part, *rows, divergence=divergence) for part in parts]
    ).logsumexp(0)
    for column, logits in enumerate((student, teacher)):
        expected = (logits[rows[0]].double() / 0.8).logsumexp(-1)
        torch.testing.assert_close(normalisers[:, column], expected, rtol=2e-7, atol=0)
    steps = {"divergence": divergence, "normalisers": normalisers}
    sums = sum(calls.jsd_sums(*part, *rows, **steps) for part in parts)
    scales = torch.tensor([1.0, -2.0, 0.5])
    gradient = torch.cat(
        [calls.jsd_gradient(*part, *rows, **steps, sums=sums, scales=scales) for part in parts], -1
    )
    value, expected = exact(student[rows[0]], teacher[rows[1]], divergence)
    torch.testing.assert_close(sums[:, 0], value, rtol=3e-6, atol=0)
    rtol, atol = (1e-4, 1e-9) if dtype == FP32 else (1e-2, 1e-9)
    torch.testing.assert_close(gradient.double(), expected * scales.double()[:, None], rtol=rtol, atol=atol)


def test_a_shard_of_nothing_but_minus_infinity_changes_nothing():
    student, teacher = pair()
    rows, nothing = (torch.arange(4),) * 2, torch.full((4, 64), -torch.inf)
    padding = calls.jsd_normalisers(nothing, nothing, *rows, divergence=SKEWED)
    assert (padding == -torch.inf).all()
    whole = calls.jsd_normalisers(student, teacher, *rows, divergence=SKEWED)
    assert torch.equal(torch.stack([whole, padding]).logsumexp(0), torch.stack([whole]).logsumexp(0))
    steps = {"divergence": SKEWED, "normalisers": whole}
    assert torch.count_nonzero(calls.jsd_sums(nothing, nothing, *rows, **steps)) == 0
    sums = calls.jsd_sums(student, teacher, *rows, **steps)
    assert torch.count_nonzero(calls.jsd_gradient(nothing, nothing, *rows, **steps, sums=sums)) == 0


@each_divergence
@each_dtype
def test_in_place_gives_the_same_bits_and_leaves_other_rows(divergence, dtype):
    student, teacher = pair(dtype=dtype)
    rows, scales = (torch.tensor([3, 1]), torch.tensor([0, 0])), torch.tensor([2.0, -0.5])
    apart = everything(student, teacher, divergence, rows=rows, scales=scales)
    own = student.clone()
    values, gradient = everything(own, teacher, divergence, rows=rows, scales=scales, in_place=True)
    assert gradient.data_ptr() == own.data_ptr() and torch.equal(values, apart[0])
    assert torch.equal(own[rows[0]], apart[1]) and torch.equal(own[[0, 2]], student[[0, 2]])


@each_divergence
@pytest.mark.parametrize("student_dtype", [FP32, BF16])
def test_differences_keep_what_two_rounded_logits_lose(divergence, student_dtype):
    """At a distance of 0.01 the gradient from bfloat16 logits is mostly rounding; from a bfloat16
    difference it is right."""
    student, teacher = pair(dtype=student_dtype, distance=0.0)
    difference = (0.01 * torch.randn(student.shape, generator=torch.Generator().manual_seed(2))).bfloat16()
    value, expected = exact(student, student.double() + difference.double(), divergence)
    found, gradient = everything(
        student, difference, divergence, teacher_is_difference=True, gradient_dtype=FP32
    )
    torch.testing.assert_close(found.double(), value, rtol=2e-3, atol=0)
    assert (gradient.double() - expected).norm() <= 1e-3 * expected.norm()
    rounded = (student.float() + difference.float()).bfloat16()
    _, lost = everything(student.bfloat16(), rounded, divergence, gradient_dtype=FP32)
    assert (lost.double() - expected).norm() > 0.3 * expected.norm()


def test_what_does_not_fit_is_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="in_place with gradient_dtype=torch.bfloat16, with_gradient=True"):
        everything(student, teacher, in_place=True, gradient_dtype=BF16)
    with pytest.raises(
        ValueError, match=r"in_place on logits of strides \(1, 4\), expected adjacent columns"
    ):
        everything(student.t().contiguous().t(), teacher, in_place=True)
    with pytest.raises(ValueError, match="no native code for divergence='mse', expected one of"):
        everything(student, teacher, replace(JSD, kind="mse"))
    with pytest.raises(ValueError, match="no native code for top_k=4"):
        everything(student, teacher, replace(JSD, top_k=4))
