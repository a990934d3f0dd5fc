"""A block of the head's rows by native visits, against the same block by torch; and who is asked when."""

import logging
from dataclasses import replace

import pytest
import torch

from megatron_sd.errors import ConfigError
from megatron_sd.ops.head import one_pass
from megatron_sd.ops.head.native_block import native_obstacle, visit_native_block
from megatron_sd.ops.head.torch_block import visit_torch_block
from megatron_sd.ops.head.types import HeadBlock
from megatron_sd.ops.head.vocab_parallel import VocabShard
from megatron_sd.ops.native import cpu_library
from tests.ops.divergences import JSD, each_of
from tests.ops.head_cases import BF16, EPS, FP32, error, make
from tests.ops.test_linear_jsd import NUM_ROWS, Watch, curved_loss, options, run

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)

each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16])


SCALED = replace(JSD, scale_by_temperature_squared=True)
IN_SEVEN = replace(SCALED, top_k=7)
OF_FEW = {  # divergences of the likeliest tokens
    "jsd": IN_SEVEN,
    "one": replace(IN_SEVEN, top_k=1, kind="reverse_kl"),
    "student's": replace(IN_SEVEN, support="student", kind="forward_kl"),
    "tail": replace(IN_SEVEN, tail_bucket=True),
    "student's, tail": replace(IN_SEVEN, support="student", kind="reverse_kl", tail_bucket=True),
    "mse": replace(IN_SEVEN, top_k=100, kind="mse"),
    "clipped": replace(IN_SEVEN, entry_clip=0.01, tail_bucket=True),
}
each_divergence = each_of(("jsd", "forward_kl", "reverse_kl", "sampled"), like=SCALED)
each_of_few = pytest.mark.parametrize("divergence", OF_FEW.values(), ids=OF_FEW)


def bent(values):
    """Every number counts, those of the policy not linearly."""
    policy = (values.logprobs.exp() * torch.linspace(-3, 3, len(values.logprobs))).sum()
    weights = torch.linspace(2, -1, len(values.divergences))
    return policy + values.entropies.square().sum() + (weights * values.divergences).sum()


@torch.no_grad()
def visited(visit, case, row_loss=bent, **changes):
    """(values, gradient) of one block."""
    logits = case.logits.clone()
    block = HeadBlock(logits, case.teacher.clone(), case.targets, case.query_rows, case.is_difference)
    wanted = options(sampling_temperature=case.temperature, divergence=case.divergence, **changes)
    return visit(block, row_loss, wanted), logits


def assert_is_torchs(case):
    """(values, gradient) of the native visits, after a look at those of torch."""
    (found, gradient), (expected, other) = (visited(v, case) for v in (visit_native_block, visit_torch_block))
    is_nan = expected.divergences.isnan()  # where it does not matter which tokens were taken
    masses = [each.truncated_masses.masked_fill(is_nan, 0.0) for each in (found, expected)]
    found, expected = (v._replace(truncated_masses=m) for v, m in zip((found, expected), masses, strict=True))
    for name, column in found._asdict().items():
        torch.testing.assert_close(
            column,
            getattr(expected, name),
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert not column.requires_grad
    assert torch.equal(gradient.isnan().any(-1), other.isnan().any(-1))
    for own, expected_row in zip(gradient, other, strict=True):
        assert expected_row.isnan().any() or error(own, expected_row) <= 5 * EPS[case.logits.dtype]
    return found


@each_divergence
@each_dtype
@pytest.mark.parametrize("is_difference", [True, False])
@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_equals_torch(temperature, is_difference, dtype, divergence):
    divergence = divergence if divergence.kind == "sampled" else replace(divergence, temperature=1.3)
    case = make(dtype=dtype, divergence=divergence, is_difference=is_difference, temperature=temperature)
    found = assert_is_torchs(case)
    values, logits = visited(visit_native_block, case, row_loss=None)
    assert torch.equal(logits, case.logits) and values.loss == 0
    assert torch.equal(values.logprobs, found.logprobs)


def spoil(case, how):
    """Two rows of nine of a case in which every row is a query row."""
    logits, teacher = case.logits, case.teacher
    if how == "masked in both":
        logits[:, 400:] = -torch.inf
        teacher[:, 400:] = 0.0 if case.is_difference else -torch.inf
        case.targets.clamp_(max=399)
    elif how == "masked in one":
        logits[1, :30] = -torch.inf
        if not case.is_difference:
            teacher[4, 30:60] = -torch.inf
    elif how == "a masked target":
        logits[2, case.targets[2]] = -torch.inf
        if not case.is_difference:
            teacher[5, case.targets[5]] = -torch.inf
    elif how == "nothing left":
        logits[3] = -torch.inf
        if not case.is_difference:
            teacher[6] = -torch.inf
    else:
        value = {"NaN": torch.nan, "infinite": torch.inf}[how]
        logits[1, 3], teacher[5, 529] = value, value


@each_divergence
@each_dtype
@pytest.mark.parametrize("is_difference", [True, False])
@pytest.mark.parametrize(
    "how", ["masked in both", "masked in one", "a masked target", "nothing left", "NaN", "infinite"]
)
def test_spoilt_rows_are_those_of_torch(how, is_difference, dtype, divergence):
    case = make(
        num_rows=9,
        query_rows=range(9),
        vocabulary=530,
        dtype=dtype,
        is_difference=is_difference,
        divergence=divergence,
    )
    spoil(case, how)
    assert_is_torchs(case)


@each_of_few
@each_dtype
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.8, 1.3)])
def test_the_likeliest_tokens_are_torchs(temperatures, dtype, divergence):
    own, of_divergence = temperatures
    divergence = replace(divergence, temperature=of_divergence)
    case = make(dtype=dtype, teacher_dtype=FP32, divergence=divergence, temperature=own)
    case.logits[:, ::140] = torch.arange(5.0, 15.0).to(dtype)  # apart: of equal ones torch may take others
    found = assert_is_torchs(case)
    assert (found.truncated_masses > 0).all()


@each_of_few
@each_dtype
@pytest.mark.parametrize("how", ["masked in both", "masked in one", "a masked target", "nothing left", "NaN"])
def test_spoilt_rows_of_the_likeliest_tokens_are_those_of_torch(how, dtype, divergence):
    case = make(
        num_rows=9,
        query_rows=range(9),
        vocabulary=530,
        dtype=dtype,
        teacher_dtype=FP32,
        is_difference=False,
        divergence=divergence,
    )
    case.logits[:, ::60] = torch.arange(5.0, 14.0).to(dtype)
    spoil(case, how)
    if how == "nothing left" and divergence.tail_bucket:
        case.teacher[6] = 0.0  # torch's tail would be a distribution by itself: no NaN
    assert_is_torchs(case)


def test_an_infinite_logit_is_nan_inside_the_support_and_outside():
    """torch looks at those inside alone."""
    case = make(num_rows=9, query_rows=range(9), is_difference=False, divergence=IN_SEVEN)
    spoil(case, "infinite")
    found, gradient = visited(visit_native_block, case)
    assert found.divergences.isnan().tolist() == [row in (1, 5) for row in range(9)]
    assert gradient.isnan().any(-1).tolist() == [row in (1, 5) for row in range(9)]


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("tail_bucket", [False, True])
def test_all_tokens_are_the_full_vocabulary(support, tail_bucket):
    """A top_k of V has no tail, and nothing outside."""
    full = make(divergence=SCALED)
    divergence = replace(SCALED, top_k=1333, support=support, tail_bucket=tail_bucket)
    found, gradient = visited(visit_native_block, replace(full, divergence=divergence))
    expected, other = visited(visit_native_block, full)
    torch.testing.assert_close(found.divergences, expected.divergences, rtol=1e-5, atol=1e-7)
    assert error(gradient, other) <= EPS[FP32] and torch.count_nonzero(found.truncated_masses) == 0
    with pytest.raises(ConfigError, match="distill.top_k is 1334, expected at most the vocabulary size 1333"):
        visited(visit_native_block, replace(full, divergence=replace(SCALED, top_k=1334)))


def test_a_nan_is_named_in_the_log(caplog):
    case = make()
    case.logits[3, 5] = torch.nan
    with caplog.at_level(logging.WARNING):
        visited(visit_native_block, case, row_loss=None)
    assert "1 of 3 divergences are NaN, first that of student row 3 and teacher row 1" in caplog.text


def test_the_loss_is_asked_once_a_chunk():
    asked = []

    def row_loss(values, rows, queries):
        asked.append((rows, queries))
        return curved_loss(values, rows, queries)

    run(4, row_loss=row_loss)
    assert asked == [
        (slice(0, 4), slice(0, 2)),
        (slice(4, 8), slice(2, 4)),
        (slice(8, 11), slice(4, 5)),
    ]


def test_in_bfloat16_no_float32_logits_exist():
    with FloatWatch() as watch:
        run(NUM_ROWS, dtype=BF16)
    assert watch.largest == 0


class FloatWatch(Watch):
    """The same, of float32 matrices alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        largest, out = self.largest, super().__torch_dispatch__(func, types, args, kwargs)
        if torch.is_tensor(out) and out.dtype != FP32:
            self.largest = largest
        return out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"divergence": replace(JSD, kind="sampled")}, ""),
        ({"divergence": replace(JSD, kind="mse")}, "divergence='mse'"),
        ({"divergence": replace(JSD, entry_clip=0.1)}, "entry_clip=0.1"),
        ({"divergence": replace(JSD, entry_clip=0.1, kind="mse", top_k=3)}, ""),
        ({"target": "uniform"}, "target='uniform'"),
        ({"shard": VocabShard(start=0, num_real=4, gather=lambda own: own[None])}, "a sharded vocabulary"),
    ],
)
def test_what_native_code_does_not_know_is_named(changes, why):
    assert native_obstacle(block_of(torch.zeros(2, 4)), options(**changes)) == why


def block_of(logits):
    """In which every row is a query row."""
    rows = torch.arange(len(logits))
    return HeadBlock(logits, torch.zeros(logits.shape), rows, rows, True)


def test_other_dtypes_and_devices_are_torchs(caplog):
    one_pass._say_once.cache_clear()
    logits = torch.zeros(2, 4)
    for dtype in (torch.float64, torch.float16):
        assert native_obstacle(block_of(logits.to(dtype)), options()) == f"student logits of {dtype}"
    assert native_obstacle(block_of(logits.to("meta")), options()) == "tensors on meta"
    with caplog.at_level(logging.INFO):
        run(4)
        run(4)
        run(4, divergence=replace(JSD, entry_clip=0.1))
    assert [record.getMessage() for record in caplog.records if "the head's" in record.getMessage()] == [
        f"the head's rows go through native code ({cpu_library.INSTRUCTION_SET})",
        "the head's rows go through torch (entry_clip=0.1)",
    ]


def test_without_a_library_torch_gives_the_same(monkeypatch):
    values, gradients = run(4)
    monkeypatch.setattr(cpu_library, "LIBRARY", None)
    monkeypatch.setattr(cpu_library, "MISSING", "the file does not exist")
    expected, expected_gradients = run(4)
    for found, other in zip((*values, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
