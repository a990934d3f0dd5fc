"""The native divergence against float64 and against the reference in the same dtype; every instruction set;
autograd; compile."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sd.ops import jsd
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.ops.native import calls, cpu_library, torch_ops
from megatron_sd.ops.native.structs import NATIVE_DIVERGENCES
from tests.ops.divergences import JSD, each_divergence

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)

AVAILABLE = cpu_library.INSTRUCTION_SETS[
    : cpu_library.INSTRUCTION_SETS.index(cpu_library.INSTRUCTION_SET) + 1
]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
EPS = {torch.float32: 2e-7, torch.bfloat16: 4e-3}  # one rounding of the gradient as it is stored, twice


def pair(num_rows, vocabulary, *, distance, dtype, seed=0):
    """Student logits of a sharp distribution and a teacher `distance` away (standard deviation of the
    logits' difference)."""
    generator = torch.Generator().manual_seed(seed)
    student = 3.0 * torch.randn(num_rows, vocabulary, generator=generator)
    teacher = student + distance * torch.randn(num_rows, vocabulary, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def value_and_gradient(student, teacher, divergence=JSD, *, impl, rows=None, weights=None):
    """Through the door; rows default to every row in order."""
    student = student.clone().requires_grad_()
    rows = rows or (torch.arange(len(student)),) * 2
    weights = torch.ones(len(rows[0])) if weights is None else weights
    values = jsd_rows(student, teacher, *rows, weights, divergence=divergence, impl=impl).values
    values.sum().backward()
    return values.detach(), student.grad


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@each_divergence
@each_dtype
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_every_instruction_set_meets_the_error_bound(divergence, dtype, instruction_set):
    student, teacher = pair(5, 1333, distance=0.5, dtype=dtype)
    rows = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 2])
    divergence = replace(divergence, beta=0.3, temperature=0.8)
    common = {"divergence": divergence, "with_gradient": True, "instruction_set": instruction_set}
    values, gradient = calls.native_divergence(student, teacher, *rows, **common)
    chosen, other = student[rows[0]], teacher[rows[1]]
    exact, exact_gradient = value_and_gradient(chosen.double(), other.double(), divergence, impl="torch")
    torch_value, torch_gradient = value_and_gradient(chosen, other, divergence, impl="torch")
    assert relative_error(values, exact) <= 2 * relative_error(torch_value, exact) + EPS[torch.float32]
    assert (
        relative_error(gradient, exact_gradient)
        <= 2 * relative_error(torch_gradient, exact_gradient) + EPS[dtype]
    )
    every = (torch.arange(3),) * 2
    same = calls.native_divergence(chosen, chosen, *every, **common)
    assert torch.count_nonzero(same[0]) == 0 and torch.count_nonzero(same[1]) == 0


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_scattered_rows_are_scaled_and_summed(instruction_set):
    gradient = torch.arange(12.0).reshape(3, 4)
    scales = torch.tensor([0.5, 2.0, -1.0])
    out = calls.scatter_rows(
        gradient, torch.tensor([3, 1, 3]), scales, num_rows=5, instruction_set=instruction_set
    )
    zero = [0.0] * 4
    assert out.tolist() == [zero, [8.0, 10.0, 12.0, 14.0], zero, [-8.0, -8.5, -9.0, -9.5], zero]


@each_dtype
def test_threads_and_neighbours_do_not_change_a_row(dtype):
    student, teacher = pair(7, 900, distance=0.3, dtype=dtype)
    together = value_and_gradient(student, teacher, impl="cpp")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded = value_and_gradient(student, teacher, impl="cpp")
    finally:
        torch.set_num_threads(num_threads)
    alone = [value_and_gradient(student[i : i + 1], teacher[i : i + 1], impl="cpp") for i in range(7)]
    for found in (threaded, tuple(torch.cat(column) for column in zip(*alone, strict=True))):
        assert torch.equal(found[0], together[0]) and torch.equal(found[1], together[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.001, 300.0),
    st.integers(1, 1100),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equal_rows_give_exactly_zero(seed, scale, vocabulary, dtype):
    student = (scale * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype)
    for kind in NATIVE_DIVERGENCES:
        divergence = replace(JSD, kind=kind, beta=0.3, temperature=0.7)
        values, gradient = value_and_gradient(student, student.clone(), divergence, impl="cpp")
        assert torch.count_nonzero(values) == 0 and torch.count_nonzero(gradient) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100.0), st.integers(1, 1100), st.floats(0.01, 0.99))
def test_value_is_finite_and_bounded_and_the_gradient_sums_to_zero(seed, distance, vocabulary, beta):
    student, teacher = pair(3, vocabulary, distance=distance, dtype=torch.float32, seed=seed)
    values, gradient = value_and_gradient(student, teacher, replace(JSD, beta=beta), impl="cpp")
    bound = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log()).item()
    assert (values >= -1e-7).all() and (values <= bound * (1 + 1e-5)).all()
    assert gradient.sum(-1).abs().max() <= 1e-6 + 2e-7 * distance  # normalisers of that size, in float32


@each_dtype
def test_listed_rows_weights_and_repeated_rows(dtype):
    student, teacher = pair(8, 700, distance=1.0, dtype=dtype)
    rows = torch.tensor([6, 1, 6, 3]), torch.tensor([0, 4, 4, 7])
    weights = torch.tensor([2.0, 0.0, 0.5, -1.0])
    expected = value_and_gradient(student, teacher, impl="torch", rows=rows, weights=weights)
    found = value_and_gradient(student, teacher, impl="cpp", rows=rows, weights=weights)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found[1], expected[1], rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-7
    )
    assert found[1].abs().sum(-1).ne(0).tolist() == [False, False, False, True, False, False, True, False]


def test_rows_may_be_int32_and_dtypes_may_differ():
    student, teacher = pair(4, 300, distance=0.2, dtype=torch.float32)
    rows = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    found = value_and_gradient(student, teacher.bfloat16(), impl="cpp", rows=rows)
    expected = value_and_gradient(
        student, teacher.bfloat16().float(), impl="cpp", rows=tuple(r.long() for r in rows)
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_layouts_in_memory_do_not_matter():
    student, teacher = pair(6, 515, distance=0.2, dtype=torch.float32)
    expected = value_and_gradient(student, teacher, impl="cpp")
    padded = torch.full((6, 600), torch.nan)
    padded[:, 3:518] = teacher
    for layout in (padded[:, 3:518], teacher.t().contiguous().t()):
        found = value_and_gradient(student.t().contiguous().t(), layout, impl="cpp")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_no_rows_stay_connected():
    student, teacher = pair(4, 10, distance=1.0, dtype=torch.float32)
    nothing = torch.zeros(0, dtype=torch.long)
    values, gradient = value_and_gradient(student, teacher, impl="cpp", rows=(nothing, nothing))
    assert values.shape == (0,) and torch.count_nonzero(gradient) == 0 and gradient.shape == (4, 10)
    values, gradient = value_and_gradient(student[:0], teacher[:0], impl="cpp", rows=(nothing, nothing))
    assert gradient.shape == (0, 10)


@each_divergence
@each_dtype
def test_minus_infinity(divergence, dtype):
    """Masked in both: a smaller vocabulary. In one: as the reference. All masked, a NaN or +inf: NaN, in
    that row alone."""
    student, teacher = pair(4, 530, distance=0.5, dtype=dtype)
    small = value_and_gradient(student[:, :400], teacher[:, :400], divergence, impl="cpp")
    student[:, 400:], teacher[:, 400:] = -torch.inf, -torch.inf
    values, gradient = value_and_gradient(student, teacher, divergence, impl="cpp")
    torch.testing.assert_close(values, small[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient[:, :400], small[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9
    )
    assert torch.count_nonzero(gradient[:, 400:]) == 0
    student[0, :30], teacher[1, 30:60] = -torch.inf, -torch.inf
    found = value_and_gradient(student, teacher, divergence, impl="cpp")
    expected = value_and_gradient(student, teacher, divergence, impl="torch")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
    student[1] = -torch.inf
    student[2, 7] = torch.nan
    teacher[3, 2] = torch.inf
    values, gradient = value_and_gradient(student, teacher, divergence, impl="cpp")
    assert values.isnan().tolist() == [False, True, True, True]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, True]


def test_nan_rows_are_named_in_the_log(caplog):
    student, teacher = pair(5, 40, distance=1.0, dtype=torch.float32)
    student[3, 39] = torch.nan
    with caplog.at_level(logging.WARNING):
        value_and_gradient(student, teacher, impl="cpp", rows=(torch.tensor([0, 3]), torch.tensor([1, 4])))
    assert "1 of 2 divergences are NaN, first that of student row 3 and teacher row 4" in caplog.text


@each_divergence
@each_dtype
def test_huge_logits_are_the_references(divergence, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4], [200.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [3e4, 0.0, -3e4], [0.0, 200.0, 0.0]], dtype=dtype)
    found = value_and_gradient(student, teacher, divergence, impl="cpp")
    expected = value_and_gradient(student, teacher, divergence, impl="torch")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-30)
    assert torch.isfinite(found[0]).all() and torch.isfinite(found[1]).all()


@each_dtype
def test_operators_pass_torchs_own_check(dtype):
    student, teacher = pair(5, 70, distance=0.5, dtype=dtype)
    rows = torch.tensor([4, 1, 1]), torch.tensor([0, 2, 3])
    weights = torch.tensor([1.0, 0.5, 2.0])
    for with_gradient in (True, False):
        arguments = (
            student.requires_grad_(with_gradient),
            teacher,
            *rows,
            weights,
            "jsd",
            0.5,
            1.0,
            with_gradient,
        )
        torch.library.opcheck(torch_ops.divergence_op, arguments)
    torch.library.opcheck(torch_ops.scatter_rows, (teacher[:3], rows[0], torch.tensor([1.0, 2.0, 3.0]), 6))


@pytest.mark.parametrize("student_rows", [[5, 1, 2], [0, 1, 2, 3, 4, 5]])
def test_compiles_into_one_graph(student_rows):
    student, teacher = pair(6, 90, distance=0.5, dtype=torch.float32)
    rows = torch.tensor(student_rows), torch.tensor([0, 3, 3, 1, 2, 0][: len(student_rows)])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 1.0])[: len(student_rows)]

    def loss(logits):
        scaled = logits * 1.25
        divergence = Divergence(kind="jsd", beta=0.4, temperature=1.1)  # also made inside of the graph
        return jsd_rows(scaled, teacher, *rows, weights, divergence=divergence, impl="auto").values.sum()

    eager, compiled = (student.clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=0, atol=0)


def test_the_gradient_itself_is_handed_on_where_nothing_is_left_to_do():
    """Rows in order and a plain sum: no second [N, V] is made. Another factor, and a second backward, are
    served as ever."""
    student, teacher = pair(4, 90, distance=0.5, dtype=torch.float32)
    rows, weights = torch.arange(4), torch.tensor([1.0, 0.5, 2.0, 0.0])
    leaf = student.clone().requires_grad_()
    divergence = replace(JSD, beta=0.4, temperature=1.1)
    divergences = jsd_rows(leaf, teacher, rows, rows, weights, divergence=divergence, impl="cpp").values
    for _ in range(2):
        divergences.sum().backward(retain_graph=True)
    kept = divergences.grad_fn.saved_tensors[0].data_ptr()
    (tripled,) = torch.autograd.grad(divergences.sum() * 3.0, leaf, retain_graph=True)
    (found,) = torch.autograd.grad(divergences.sum(), leaf)
    assert found.data_ptr() == kept != tripled.data_ptr()
    _, expected = value_and_gradient(student, teacher, divergence, impl="cpp")
    torch.testing.assert_close(found, expected * weights[:, None])
    torch.testing.assert_close(tripled, 3.0 * found)
    torch.testing.assert_close(leaf.grad, 2.0 * found)


def test_finite_differences():
    student, teacher = pair(2, 40, distance=1.0, dtype=torch.float32)
    direction = torch.randn(2, 40, generator=torch.Generator().manual_seed(9))
    divergence = replace(JSD, beta=0.2, temperature=1.3)
    _, gradient = value_and_gradient(student, teacher, divergence, impl="cpp")
    moved = [student.double() + step * direction for step in (1e-4, -1e-4)]
    up, down = (divergence_rows(logits, teacher.double(), divergence).values.sum().item() for logits in moved)
    assert (gradient * direction).sum().item() == pytest.approx((up - down) / 2e-4, rel=1e-5)


def test_auto_says_once_what_runs(caplog):
    jsd._say_once.cache_clear()
    student, teacher = pair(2, 20, distance=1.0, dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            value_and_gradient(student, teacher, impl="auto")
        value_and_gradient(student, teacher, replace(JSD, top_k=3), impl="auto")
        value_and_gradient(student.double(), teacher.double(), impl="auto")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"divergence of rows: impl='auto' takes 'cpp' ({cpu_library.INSTRUCTION_SET})",
        "divergence of rows: impl='auto' takes 'torch' (top_k=3)",
        "divergence of rows: impl='auto' takes 'torch' (student logits of torch.float64)",
    ]


def test_cpp_refuses_what_it_cannot_do():
    student, teacher = pair(3, 20, distance=1.0, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"impl='cpp' cannot serve teacher logits of torch.float64; expected CPU tensors"
    ):
        value_and_gradient(student, teacher.double(), impl="cpp")
    with pytest.raises(ValueError, match="cannot serve top_k=4"):
        value_and_gradient(student, teacher, replace(JSD, top_k=4), impl="cpp")
    with pytest.raises(ValueError, match=r"student's vocabulary has 20 entries and the teacher's 19"):
        value_and_gradient(student, teacher[:, :19], impl="cpp")


def test_operators_refuse_rows_out_of_range_by_themselves():
    student, teacher = pair(3, 20, distance=1.0, dtype=torch.float32)
    inside, outside = torch.tensor([0, 2]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"student_rows spans 0\.\.3, expected 0\.\.2"):
        torch_ops.divergence_op(student, teacher, outside, inside, torch.ones(2), "jsd", 0.5, 1.0, False)
    with pytest.raises(ValueError, match=r"teacher_rows spans -2\.\.0, expected 0\.\.2"):
        torch_ops.divergence_op(student, teacher, inside, -inside, torch.ones(2), "jsd", 0.5, 1.0, False)
    with pytest.raises(ValueError, match=r"rows spans 0\.\.3, expected 0\.\.2"):
        torch_ops.scatter_rows(student[:2], outside, torch.ones(2), 3)
