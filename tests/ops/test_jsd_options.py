"""The divergence's options through its door: tail bucket, gradient in place, NaN, error bound,
compilation."""

import logging
from dataclasses import replace

import pytest
import torch

from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.ops.native import cpu_library
from tests.ops.divergences import JSD, each_divergence
from tests.ops.test_jsd import logits, textbook, value_and_gradient

each_implementation = pytest.mark.parametrize(
    "impl",
    [
        "torch",
        pytest.param(
            "cpp", marks=pytest.mark.skipif(cpu_library.LIBRARY is None, reason="no native library")
        ),
    ],
)
SKEWED = replace(JSD, beta=0.3, temperature=1.3)
IN_TOP_FOUR = replace(SKEWED, top_k=4)
WITH_TAIL = replace(IN_TOP_FOUR, tail_bucket=True)


def with_tail(matrix, support, temperature):
    """[N, k + 1] probabilities, written out: the support's, and 1 minus their sum."""
    inside = torch.softmax(matrix / temperature, -1).gather(-1, support)
    return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)


@each_divergence
@pytest.mark.parametrize(("beta", "temperature", "top_k"), [(0.5, 1.0, 7), (0.1, 0.7, 1), (0.9, 2.0, 39)])
def test_a_tail_bucket_is_one_more_event(divergence, beta, temperature, top_k):
    student, teacher = logits(6, 40, seed=5), logits(6, 40, seed=6)
    support = teacher.topk(top_k, -1).indices
    divergence = replace(divergence, beta=beta, temperature=temperature, top_k=top_k, tail_bucket=True)

    def definition(s):
        q, p = with_tail(s, support, temperature), with_tail(teacher, support, temperature)
        return textbook(q.log(), p.log(), replace(divergence, temperature=1.0))

    expected, expected_gradient = value_and_gradient(definition, student)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    outside = torch.ones_like(student).scatter(-1, support, 0.0).bool()
    assert (gradient[outside] != 0).all()  # what the renormalised form leaves without a gradient
    # the closed form: a token's gradient is its event's, shared out by probability
    q = torch.softmax(student / temperature, -1)
    share = gradient[outside].reshape(6, -1) / q[outside].reshape(6, -1)
    torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-7, atol=1e-10)


def test_a_tail_bucket_at_its_edges():
    """The whole vocabulary has no tail; equal rows give exactly 0; masked tails are empty events."""
    student, teacher = logits(5, 30, seed=1), logits(5, 30, seed=2)
    whole = divergence_rows(student, teacher, replace(WITH_TAIL, top_k=30)).values
    torch.testing.assert_close(whole, textbook(student, teacher, SKEWED), rtol=1e-11, atol=1e-13)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, student.clone(), WITH_TAIL), student)
    assert torch.count_nonzero(found) == 0 and torch.count_nonzero(gradient) == 0
    support = teacher.topk(4, -1).indices
    masked = torch.full_like(student, -torch.inf).scatter(-1, support, student.gather(-1, support))
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, WITH_TAIL), masked)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    both_masked = torch.full_like(teacher, -torch.inf).scatter(-1, support, teacher.gather(-1, support))
    found = divergence_rows(masked, both_masked, WITH_TAIL).values
    torch.testing.assert_close(found, divergence_rows(masked, teacher, IN_TOP_FOUR).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 10.0])
@each_divergence
def test_error_is_at_most_twice_that_of_the_formula_in_the_same_arithmetic(divergence, dtype, distance):
    """The oracle in float32 against the textbook in float32, both judged by the textbook in float64."""
    student = logits(8, 3001, scale=3.0, seed=1)
    teacher = (student + distance * logits(8, 3001, scale=1.0, seed=2)).to(dtype)
    student = student.to(dtype)
    exact, exact_gradient = value_and_gradient(
        lambda s: textbook(s, teacher.double(), divergence), student.double()
    )
    plain, plain_gradient = value_and_gradient(
        lambda s: textbook(s, teacher.float(), divergence), student.float()
    )
    rows = torch.arange(8), torch.arange(8), torch.ones(8)
    found, gradient = value_and_gradient(
        lambda s: jsd_rows(s, teacher, *rows, divergence=divergence, impl="torch"), student
    )
    assert gradient.dtype == dtype

    def error(approximate, truth):
        return ((approximate.double() - truth).norm() / truth.norm()).item()

    assert error(found, exact) <= 2 * error(plain, exact) + 2e-7 + 2e-8 / distance
    eps = {torch.float32: 2e-7, torch.bfloat16: 4e-3}[dtype]
    assert error(gradient, exact_gradient) <= 2 * error(plain_gradient, exact_gradient) + eps


def call(student, teacher, rows=None, divergence=SKEWED, **options):
    rows = rows or (torch.arange(len(student)),) * 2
    weights = torch.linspace(0.5, 2.0, len(rows[0]))
    return jsd_rows(student, teacher, *rows, weights, divergence=divergence, **options)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_is_the_same_gradient_in_the_logits_own_memory(impl, dtype, monkeypatch):
    monkeypatch.setattr("megatron_sd.ops.jsd_in_place.BLOCK_ELEMENTS", 150)  # several blocks of rows
    student, teacher = logits(7, 70, dtype=dtype), logits(5, 70, seed=1, dtype=dtype)
    rows = torch.tensor([6, 1, 3, 0]), torch.tensor([0, 4, 4, 2])
    expected = call(leaf := student.clone().requires_grad_(), teacher, rows, impl=impl)
    (expected.values * 3).sum().backward()
    scaled = (other := student.clone().requires_grad_()) * 1.0
    found = call(scaled, teacher, rows, impl=impl, in_place=True)
    scaled.retain_grad()
    (found.values * 3).sum().backward()
    assert torch.equal(found.values, expected.values)
    torch.testing.assert_close(
        other.grad, leaf.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-9
    )
    assert torch.equal(scaled.detach(), other.grad)  # the memory of the logits holds it
    assert other.grad.abs().sum(-1).ne(0).tolist() == [True, True, False, True, False, False, True]


def test_in_place_without_a_gradient_writes_nothing():
    student, teacher = logits(3, 20), logits(3, 20, seed=1)
    kept = student.clone()
    call(student, teacher, in_place=True)
    with torch.no_grad():
        call(student.requires_grad_() * 1.0, teacher, in_place=True)
    assert torch.equal(student, kept)


def test_in_place_takes_no_rows():
    student = logits(3, 20).requires_grad_()
    nothing = torch.zeros(0, dtype=torch.long)
    call(student * 1.0, logits(3, 20), (nothing, nothing), in_place=True).values.sum().backward()
    assert torch.count_nonzero(student.grad) == 0


def test_in_place_refuses_what_it_would_corrupt():
    student, teacher = logits(4, 10).requires_grad_(), logits(4, 10, seed=1)
    with pytest.raises(ValueError, match="a leaf whose values the caller owns"):
        call(student, teacher, in_place=True)
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        call((student * 1.0).t().contiguous().t(), teacher, in_place=True)
    both = torch.cat([student * 1.0, teacher])
    with pytest.raises(ValueError, match="share memory"):
        call(both[:4], both[2:6], in_place=True)
    call(both[:4], both[4:], in_place=True).values.sum().backward()  # neighbours in one matrix are fine
    rows = torch.tensor([1, 2, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="student_rows repeats 1"):
        call(student * 1.0, teacher, rows, in_place=True)
    values = call(student * 1.0, teacher, in_place=True).values.sum()
    values.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one gradient for one backward"):
        values.backward()
    kept_elsewhere = student.exp()  # exp keeps its result for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call(kept_elsewhere, teacher, in_place=True).values.sum().backward()


def test_nan_is_reported_by_row_and_stays_in_its_row(caplog):
    student, teacher = logits(5, 40), logits(5, 40, seed=1)
    student[3, 39] = torch.nan
    for divergence in (SKEWED, IN_TOP_FOUR, WITH_TAIL):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = torch.tensor([0, 3]), torch.tensor([1, 4])
            values = call(student, teacher, rows, divergence, impl="torch").values
        assert values.isnan().tolist() == [False, True]
        assert "1 of 2 divergences are NaN, first that of student row 3 and teacher row 4" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_k": 5, "tail_bucket": True}])
@each_divergence
def test_the_reference_compiles_into_one_graph(divergence, changes):
    student, teacher = logits(6, 90, dtype=torch.float32), logits(6, 90, seed=1, dtype=torch.float32)
    rows = torch.tensor([5, 1, 2]), torch.tensor([0, 3, 3])
    divergence = replace(SKEWED, kind=divergence.kind, **changes)

    def loss(matrix):
        return (call(matrix * 1.25, teacher, rows, divergence, impl="torch").values * 3.0).sum()

    eager, compiled = (student.clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-8)


def test_bad_input_is_named_with_its_numbers():
    with pytest.raises(ValueError, match="vocabulary has 151936 entries and the teacher's 152064"):
        call(torch.zeros(1, 151_936), torch.zeros(1, 152_064))
    with pytest.raises(ValueError, match="are torch.bool and torch.int64, expected int64 or int32"):
        call(logits(2, 10), logits(2, 10), (torch.tensor([True, False]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"lie on \['cpu', 'meta'\], expected one device"):
        call(logits(2, 10), logits(2, 10).to("meta"))
