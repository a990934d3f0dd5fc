"""A block of the head's rows by native visits, against the same block by torch; and who is asked when."""

import logging
from dataclasses import replace

import pytest
import torch

from megatron_sd.ops.head import one_pass
from megatron_sd.ops.head.native_block import native_obstacle, visit_native_block
from megatron_sd.ops.head.torch_block import visit_torch_block
from megatron_sd.ops.head.vocab_parallel import VocabShard
from megatron_sd.ops.native import cpu_library
from tests.ops.divergences import JSD, each_of
from tests.ops.head_cases import BF16, EPS, FP32, error, make
from tests.ops.test_linear_jsd import NUM_ROWS, Watch, curved_loss, options, run

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)

each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16])
each_divergence = each_of(
    ("jsd", "forward_kl", "reverse_kl", "sampled"), like=replace(JSD, scale_by_temperature_squared=True)
)


def bent(values):
    """Every number counts, those of the policy not linearly."""
    policy = (values.logprobs.exp() * torch.linspace(-3, 3, len(values.logprobs))).sum()
    weights = torch.linspace(2, -1, len(values.divergences))
    return policy + values.entropies.square().sum() + (weights * values.divergences).sum()


@torch.no_grad()
def visited(visit, case, row_loss=bent, **changes):
    """(values, gradient) of one block."""
    logits = case.logits.clone()
    values = visit(
        logits,
        case.teacher.clone(),
        case.targets,
        case.query_rows,
        row_loss=row_loss,
        options=options(sampling_temperature=case.temperature, divergence=case.divergence, **changes),
        teacher_is_difference=case.is_difference,
    )
    return values, logits


@each_divergence
@each_dtype
@pytest.mark.parametrize("is_difference", [True, False])
@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_equals_torch(temperature, is_difference, dtype, divergence):
    divergence = divergence if divergence.kind == "sampled" else replace(divergence, temperature=1.3)
    case = make(dtype=dtype, divergence=divergence, is_difference=is_difference, temperature=temperature)
    (found, gradient), (expected, other) = (visited(v, case) for v in (visit_native_block, visit_torch_block))
    for name, column in found._asdict().items():
        torch.testing.assert_close(
            column, getattr(expected, name), rtol=1e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not column.requires_grad
    assert error(gradient, other) <= 2 * EPS[dtype]
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
    (found, gradient), (expected, other) = (visited(v, case) for v in (visit_native_block, visit_torch_block))
    for name, column in found._asdict().items():
        torch.testing.assert_close(
            column,
            getattr(expected, name),
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert torch.equal(gradient.isnan().any(-1), other.isnan().any(-1))
    for own, expected_row in zip(gradient, other, strict=True):
        assert expected_row.isnan().any() or error(own, expected_row) <= 5 * EPS[dtype]


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
        ({"target": "uniform"}, "target='uniform'"),
        ({"shard": VocabShard(start=0, num_real=4, gather=lambda own: own[None])}, "a sharded vocabulary"),
    ],
)
def test_what_native_code_does_not_know_is_named(changes, why):
    logits = torch.zeros(2, 4)
    assert native_obstacle(logits, logits, options(**changes), teacher_is_difference=True) == why


def test_other_dtypes_and_devices_are_torchs(caplog):
    one_pass._say_once.cache_clear()
    logits = torch.zeros(2, 4)
    for dtype in (torch.float64, torch.float16):
        found = native_obstacle(logits.to(dtype), logits, options(), teacher_is_difference=True)
        assert found == f"student logits of {dtype}"
    found = native_obstacle(logits.to("meta"), logits, options(), teacher_is_difference=True)
    assert found == "tensors on meta"
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
