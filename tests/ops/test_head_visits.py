"""The head's native visits: values and finished gradient against float64, by every instruction set, and what
must not change a bit."""

from dataclasses import replace

import pytest
import torch

from megatron_sd.ops.native import cpu_library
from tests.ops.divergences import JSD, each_of
from tests.ops.head_cases import BF16, EPS, FP32, SKEWED, error, exact, make, visited
from tests.ops.test_jsd_native import AVAILABLE

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)

each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16])
each_way = pytest.mark.parametrize(
    "divergence",
    [replace(SKEWED, kind=kind) for kind in ("jsd", "forward_kl", "reverse_kl")]
    + [replace(SKEWED, top_k=9, tail_bucket=has_tail) for has_tail in (False, True)],
    ids=["jsd", "forward_kl", "reverse_kl", "top_k", "tail"],
)
each_divergence = each_of(("jsd", "forward_kl", "reverse_kl"), like=SKEWED)


def assert_is_exact(case, **options):
    """Numbers to float32's rounding, the gradient to that of its dtype."""
    found, expected = visited(case, **options), exact(case)
    for name, column in found._asdict().items():
        if name == "gradient" or len(column) == 0:
            continue
        assert column.dtype == FP32
        torch.testing.assert_close(
            column.double(), getattr(expected, name), rtol=3e-6, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found.gradient.dtype == case.logits.dtype
    assert error(found.gradient, expected.gradient) <= EPS[case.logits.dtype]


@each_divergence
@each_dtype
@pytest.mark.parametrize("is_difference", [True, False])
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_equals_float64(instruction_set, is_difference, dtype, divergence):
    case = make(dtype=dtype, is_difference=is_difference, divergence=divergence)
    assert_is_exact(case, instruction_set=instruction_set)


@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 5, 511, 512, 513, 4096])
def test_any_size_of_the_vocabulary(vocabulary, dtype):
    assert_is_exact(make(vocabulary=vocabulary, dtype=dtype, distance=1.0))


@pytest.mark.parametrize("query_rows", [(), (0,), (6,), (0, 1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.7), (0.6, 1.4)])
def test_any_query_rows_and_temperatures(query_rows, temperatures):
    own, of_divergence = temperatures
    divergence = replace(JSD, temperature=of_divergence)
    assert_is_exact(make(query_rows=query_rows, temperature=own, divergence=divergence))


@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, FP32)])
def test_dtypes_may_differ(dtypes):
    assert_is_exact(make(dtype=dtypes[0], teacher_dtype=dtypes[1]))


def test_without_a_divergence_the_teachers_own_numbers_remain():
    case = make(divergence=None)
    assert_is_exact(case)
    assert torch.count_nonzero(visited(case).divergences) == 0


def test_distant_and_close_rows_mix():
    """Some blocks take the polynomials, some powers and logarithms; large logits and tiny probabilities."""
    case = make(distance=0.01, is_difference=False)
    case.teacher[:, 600:700] += 20.0
    case.logits[2] *= 30.0
    assert_is_exact(case)


@each_way
@each_dtype
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_threads_and_neighbours_do_not_change_a_row(instruction_set, dtype, divergence):
    case = make(dtype=dtype, divergence=divergence)
    together = visited(case, instruction_set=instruction_set)
    num_threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            again = visited(case, instruction_set=instruction_set)
        finally:
            torch.set_num_threads(num_threads)
        assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    query = 0
    for row in range(len(case.logits)):
        is_query = row in case.query_rows
        own = replace(
            case,
            logits=case.logits[row : row + 1],
            targets=case.targets[row : row + 1],
            teacher=case.teacher[query : query + is_query],
            query_rows=torch.zeros(int(is_query), dtype=torch.long),
        )
        visits = own.visits(instruction_set=instruction_set)
        slopes = case.slopes()
        gradient = visits.write_gradient(
            slopes[0][row : row + 1], slopes[1][row : row + 1], slopes[2][query : query + is_query]
        )
        assert torch.equal(gradient[0], together.gradient[row])
        assert visits.numbers.logprobs[0] == together.logprobs[row]
        query += is_query


@each_way
@each_dtype
@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_the_policys_bits_do_not_depend_on_the_teacher(instruction_set, dtype, divergence):
    case = make(dtype=dtype, divergence=divergence)
    alone = replace(case, teacher=case.teacher[:0], query_rows=case.query_rows[:0])
    own, entropy, of_divergences = case.slopes()
    visits = [each.visits(instruction_set=instruction_set) for each in (case, case, alone)]
    expected = visits[0].write_gradient(own, entropy, torch.zeros_like(of_divergences))
    for each in visits[1:]:
        assert torch.equal(each.write_gradient(own, entropy, None), expected)
        assert torch.equal(each.numbers.logprobs, visits[0].numbers.logprobs)
        assert torch.equal(each.numbers.entropies, visits[0].numbers.entropies)


@each_divergence
@each_dtype
@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("is_difference", [True, False])
def test_equal_rows_give_exactly_zero(is_difference, instruction_set, dtype, divergence):
    case = make(dtype=dtype, divergence=divergence, is_difference=is_difference, distance=0.0)
    visits = case.visits(instruction_set=instruction_set)
    assert torch.count_nonzero(visits.numbers.divergences) == 0
    assert torch.count_nonzero(visits.write_gradient(None, None, torch.ones(3))) == 0
    assert torch.equal(visits.numbers.teacher_logprobs, visits.numbers.logprobs[case.query_rows])


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("top_k", [1, 7, 600, 1333])
def test_the_likeliest_tokens(top_k, support, instruction_set):
    """Which they are, their logits on both sides, all others as one token, and the student's mass on them."""
    divergence = replace(SKEWED, top_k=top_k, support=support, tail_bucket=True)
    case = make(divergence=divergence)
    found = case.visits(instruction_set=instruction_set).likeliest
    student, teacher = case.logits[case.query_rows], case.teacher_logits.float()
    chosen = teacher if support == "teacher" else student
    columns = chosen.topk(top_k, -1).indices.sort(-1).values
    assert torch.equal(found.support, columns)
    for logits, events in ((student, found.student), (teacher, found.teacher)):
        torch.testing.assert_close(events[:, :top_k], logits.gather(-1, columns), rtol=1e-7, atol=1e-7)
        if top_k < 1333:
            outside = logits.double().scatter(-1, columns, -torch.inf) / divergence.temperature
            tail = outside.logsumexp(-1) * divergence.temperature
            torch.testing.assert_close(events[:, top_k].double(), tail, rtol=1e-6, atol=1e-6)
    assert found.student.shape[1] == top_k + (top_k < 1333)
    probabilities = torch.softmax(student.double() / divergence.temperature, -1)
    mass = probabilities.scatter(-1, columns, 0.0).sum(-1)
    torch.testing.assert_close(found.truncated_masses.double(), mass, rtol=1e-5, atol=0)


def test_of_equal_logits_the_first_are_taken():
    case = make(vocabulary=1100, query_rows=(0, 1), is_difference=False, divergence=replace(JSD, top_k=4))
    case.teacher[:] = 1.0
    case.teacher[0, [3, 600, 1099]] = 2.0
    assert case.visits().likeliest.support.tolist() == [[0, 3, 600, 1099], [0, 1, 2, 3]]


def test_what_has_no_part_in_the_loss_is_left_out():
    """Each kind of slope alone; and a NaN that nobody asks for stays away."""
    case = make()
    case.teacher[1, 7] = torch.nan
    slopes = case.slopes()
    sound = replace(case, teacher=torch.zeros_like(case.teacher))
    for kind in (0, 1):
        alone = [slope if kind == place else None for place, slope in enumerate(slopes)]
        with_zeros = [slope * (kind == place) for place, slope in enumerate(slopes)]
        gradient = case.visits().write_gradient(*alone)
        assert gradient.isfinite().all()
        assert torch.equal(gradient, sound.visits().write_gradient(*with_zeros))
    assert torch.count_nonzero(case.visits().write_gradient(None, None, None)) == 0


def test_what_does_not_fit_is_refused():
    case = make()
    outside = replace(case, targets=case.targets + case.logits.shape[1])
    with pytest.raises(ValueError, match=r"targets spans .* expected 0\.\.1332"):
        outside.visits()
    with pytest.raises(ValueError, match=r"query_rows spans 0\.\.7, expected 0\.\.6"):
        replace(case, query_rows=torch.tensor([0, 3, 7])).visits()
    with pytest.raises(ValueError, match=r"no native code for divergence='mse'"):
        replace(case, divergence=replace(JSD, kind="mse")).visits()
    long, narrow = replace(case, targets=case.targets.repeat(2)), replace(case, teacher=case.teacher[:, 1:])
    for misfit in (long, narrow, replace(case, teacher=case.teacher[1:])):
        with pytest.raises(ValueError, match=r"expected \[R\], \[Q\], \[R, V\] and \[Q, V\]"):
            misfit.visits()


def test_rows_and_targets_may_be_any_integers():
    case = make()
    found = visited(replace(case, targets=case.targets.int(), query_rows=case.query_rows.int()))
    for one, other in zip(found, visited(case), strict=True):
        assert torch.equal(one, other)
