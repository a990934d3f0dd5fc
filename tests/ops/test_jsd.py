"""The divergence oracle against float64 autograd of the textbook formulas, and its door's checks."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.errors import ConfigError
from megatron_sd.ops.divergence import ROW_DIVERGENCES
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import divergence_rows
from tests.ops.divergences import JSD, each_divergence, each_of


def textbook(student, teacher, divergence):
    """The definitions over the full vocabulary, written out; autograd gives the gradient."""
    beta, temperature = divergence.beta, divergence.temperature
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    if divergence.kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if divergence.kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    if divergence.kind == "mse":
        return (p - q).square().sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def logits(*shape, scale=2.0, seed=0, dtype=torch.float64):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    ).to(dtype)


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    values = function(student)
    values = values.values if hasattr(values, "values") and not torch.is_tensor(values) else values
    values.sum().backward()
    return values.detach(), student.grad


@each_of(ROW_DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_equals_float64_autograd_of_the_definition(divergence, beta, temperature):
    student, teacher = logits(7, 83, seed=1), logits(7, 83, seed=2)
    divergence = replace(divergence, beta=beta, temperature=temperature)
    expected, expected_gradient = value_and_gradient(lambda s: textbook(s, teacher, divergence), student)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


def test_known_numbers():
    """P = (3/4, 1/4), Q = (1/4, 3/4): M is uniform, so JSD = ln 2 - H(1/4) and KL = ln(3)/2."""
    teacher, student = torch.tensor([[3.0, 1.0]]).double().log(), torch.tensor([[1.0, 3.0]]).double().log()
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    jsd = divergence_rows(student, teacher, JSD).values.item()
    assert jsd == pytest.approx(math.log(2) - entropy, abs=1e-15)
    for name in ("forward_kl", "reverse_kl"):
        found = divergence_rows(student, teacher, replace(JSD, kind=name)).values.item()
        assert found == pytest.approx(math.log(3) / 2)
    found = divergence_rows(student, teacher, replace(JSD, kind="mse")).values.item()
    assert found == pytest.approx(0.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 200.0), st.sampled_from([torch.float32, torch.float64]))
def test_bounded_by_ln_2_symmetric_and_never_negative(seed, scale, dtype):
    student, teacher = (
        logits(5, 33, scale=scale, seed=seed, dtype=dtype),
        logits(5, 33, scale=scale, seed=seed + 1, dtype=dtype),
    )
    values = divergence_rows(student, teacher, JSD).values
    assert ((values >= 0) & (values <= math.log(2) * (1 + 1e-5))).all()
    torch.testing.assert_close(divergence_rows(teacher, student, JSD).values, values, rtol=1e-5, atol=1e-9)


@each_of(ROW_DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [None, 5])
def test_equal_logits_give_exactly_zero(divergence, dtype, top_k):
    student = logits(9, 301, scale=8.0, dtype=dtype)
    divergence = replace(divergence, beta=0.3, temperature=0.7, top_k=top_k)
    values, gradient = value_and_gradient(lambda s: divergence_rows(s, student.clone(), divergence), student)
    assert torch.count_nonzero(values) == 0
    assert torch.count_nonzero(gradient) == 0


def test_limits_of_beta_are_the_kls_scaled():
    """JSD_beta / beta -> KL(P||Q) as beta -> 0, JSD_beta / (1 - beta) -> KL(Q||P) as beta -> 1; JSD itself
    vanishes."""
    student, teacher = logits(4, 50, seed=3), logits(4, 50, seed=4)
    forward = divergence_rows(student, teacher, replace(JSD, kind="forward_kl")).values
    reverse = divergence_rows(student, teacher, replace(JSD, kind="reverse_kl")).values
    near_zero = divergence_rows(student, teacher, replace(JSD, beta=1e-6)).values
    near_one = divergence_rows(student, teacher, replace(JSD, beta=1 - 1e-6)).values
    torch.testing.assert_close(near_zero / 1e-6, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(near_one / 1e-6, reverse, rtol=1e-3, atol=0)


def test_teacher_gets_no_gradient():
    student, teacher = logits(3, 20).requires_grad_(), logits(3, 20, seed=1).requires_grad_()
    divergence_rows(student, teacher, replace(JSD, top_k=4)).values.sum().backward()
    assert teacher.grad is None


def test_top_k_renormalises_over_the_teachers_support_and_reports_the_mass_outside():
    student, teacher = logits(6, 40, seed=5), logits(6, 40, seed=6)
    divergence = replace(JSD, temperature=1.3, top_k=7)
    support = teacher.topk(7, -1).indices
    inner, inner_gradient = value_and_gradient(
        lambda s: textbook(s, teacher.gather(-1, support), divergence), student.gather(-1, support)
    )
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    torch.testing.assert_close(found, inner, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        gradient, torch.zeros_like(student).scatter(-1, support, inner_gradient), rtol=1e-9, atol=1e-13
    )
    mass = divergence_rows(student, teacher, divergence).truncated_mass
    outside = 1 - torch.softmax(student / 1.3, -1).gather(-1, support).sum(-1)
    torch.testing.assert_close(mass, outside, rtol=1e-9, atol=1e-12)
    everything = divergence_rows(student, teacher, replace(divergence, top_k=40))
    torch.testing.assert_close(
        everything.values, textbook(student, teacher, divergence), rtol=1e-11, atol=1e-13
    )
    torch.testing.assert_close(everything.truncated_mass, torch.zeros(6).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_infinity(dtype):
    """Masked in both: the same as a smaller vocabulary. Masked in one: finite. All masked: NaN."""
    student, teacher = logits(3, 12, seed=7, dtype=dtype), logits(3, 12, seed=8, dtype=dtype)
    small, small_gradient = value_and_gradient(
        lambda s: divergence_rows(s, teacher[:, :9], JSD), student[:, :9]
    )
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, 9:], masked_teacher[:, 9:] = -torch.inf, -torch.inf
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, masked_teacher, JSD), masked_student)
    torch.testing.assert_close(found, small)
    torch.testing.assert_close(gradient[:, :9], small_gradient)
    assert torch.count_nonzero(gradient[:, 9:]) == 0
    one_sided, gradient = value_and_gradient(lambda s: divergence_rows(s, masked_teacher, JSD), student)
    assert torch.isfinite(one_sided).all() and torch.isfinite(gradient).all()
    masked_student[1] = -torch.inf
    values = divergence_rows(masked_student, teacher, JSD).values
    assert values.isnan().tolist() == [False, True, False]


@each_divergence
def test_huge_logits_stay_finite(divergence):
    student = torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [3e4, 0.0, -3e4]])
    values, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    assert values[1] == 0
    if divergence.kind == "jsd":
        assert values[0].item() == pytest.approx(math.log(2), abs=1e-6)


def door(student, teacher, rows, divergence=JSD, impl="auto"):
    weights = torch.ones(len(rows[0]))
    return jsd_rows(student, teacher, *rows, weights, divergence=divergence, impl=impl)


def test_door_selects_rows_and_weighs_them():
    student, teacher = logits(8, 30).requires_grad_(), logits(5, 30, seed=1)
    rows = torch.tensor([6, 1, 3]), torch.tensor([0, 4, 4])
    weights = torch.tensor([2.0, 0.0, 0.5]).double()
    result = jsd_rows(student, teacher, *rows, weights, divergence=JSD)
    expected = textbook(student[rows[0]], teacher[rows[1]], JSD) * weights
    torch.testing.assert_close(result.values, expected, rtol=1e-12, atol=1e-14)
    result.values.sum().backward()
    assert student.grad.abs().sum(-1).ne(0).tolist() == [False, False, False, True, False, False, True, False]


def test_door_takes_no_rows_and_stays_connected():
    student = logits(4, 10).requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    door(student, logits(4, 10), (nothing, nothing)).values.sum().backward()
    assert torch.count_nonzero(student.grad) == 0


def test_door_computes_in_float32():
    student, teacher = logits(4, 64, dtype=torch.bfloat16), logits(4, 64, seed=1, dtype=torch.bfloat16)
    rows = torch.arange(4), torch.arange(4)
    assert door(student, teacher, rows).values.dtype == torch.float32
    torch.testing.assert_close(
        door(student, teacher, rows).values, door(student.float(), teacher.float(), rows).values
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, "distill.beta is 0.0, expected 0 < beta < 1"),
        ({"beta": 1.0}, "forward_kl or reverse_kl"),
        ({"beta": float("nan")}, "distill.beta is nan, expected 0 < beta < 1"),
        ({"kind": "kl"}, "distill.divergence is 'kl', expected one of"),
        ({"temperature": 0.0}, "distill.temperature is 0.0"),
        ({"top_k": 0}, "distill.top_k is 0"),
        ({"tail_bucket": True}, "distill.tail_bucket is true with distill.top_k null"),
    ],
)
def test_a_divergence_is_checked_as_it_is_made(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(JSD, **changes)


@each_of(["forward_kl", "reverse_kl", "mse"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_beta_counts_for_jsd_alone(divergence, impl):
    student, teacher = logits(4, 70, dtype=torch.float32), logits(4, 70, seed=1, dtype=torch.float32)
    rows = torch.arange(4), torch.arange(4)

    def at(beta):
        own = replace(divergence, beta=beta)
        return value_and_gradient(lambda s: door(s, teacher, rows, own, impl), student)

    expected = at(0.5)
    for beta in (0.0, 1.0, -3.0):
        values, gradient = at(beta)
        assert torch.equal(values, expected[0]) and torch.equal(gradient, expected[1])


def test_door_refuses_options():
    rows = torch.arange(2), torch.arange(2)
    with pytest.raises(ConfigError, match="distill.top_k is 11, expected at most the vocabulary size 10"):
        door(logits(4, 10), logits(4, 10), rows, replace(JSD, top_k=11))
    with pytest.raises(ConfigError, match="impl is 'fast'"):
        door(logits(4, 10), logits(4, 10), rows, impl="fast")


@pytest.mark.parametrize(
    ("shapes", "rows", "words"),
    [
        (((4, 151), (4, 152)), ([0], [0]), "151 entries and the teacher's 152"),
        (((4, 10), (4, 10)), ([0, 4], [0, 1]), r"student_rows spans 0\.\.4, expected 0\.\.3"),
        (((4, 10), (2, 10)), ([0, 3], [-1, 1]), r"teacher_rows spans -1\.\.1, expected 0\.\.1"),
        (((4, 10), (4, 10)), ([0, 1], [0]), r"expected three times \[N\]"),
        (((10,), (10,)), ([0], [0]), r"expected \[rows, vocabulary\]"),
    ],
)
def test_door_refuses_tensors(shapes, rows, words):
    with pytest.raises(ValueError, match=words):
        door(logits(*shapes[0]), logits(*shapes[1]), tuple(torch.tensor(r) for r in rows))


def test_mse_has_no_native_code():
    student, teacher = logits(3, 5, dtype=torch.float32), logits(3, 5, seed=1, dtype=torch.float32)
    rows, divergence = (torch.arange(3),) * 2, replace(JSD, kind="mse")
    found = door(student, teacher, rows, divergence).values
    torch.testing.assert_close(found, textbook(student, teacher, divergence))
    with pytest.raises((ValueError, ConfigError), match="divergence='mse'|not part of this build"):
        door(student, teacher, rows, divergence, impl="cpp")
