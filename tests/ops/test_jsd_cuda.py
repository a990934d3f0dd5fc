"""The divergence on a GPU, against float64 and against torch in float32. Needs a CUDA device, the CUDA
library, torch, pytest."""

from dataclasses import replace

import pytest
import torch

from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.native import calls, cuda_library, torch_ops
from tests.ops.divergences import JSD, each_divergence
from tests.ops.jsd_cases import BF16, FP32, check, pair, reference, value_and_gradient

if not torch.cuda.is_available():
    pytest.skip(
        "torch sees no CUDA device: run `make gpu-check` on a machine with one", allow_module_level=True
    )
if obstacle := cuda_library.obstacle(0):
    pytest.skip(obstacle, allow_module_level=True)

KINDS = {
    "bf16": (BF16, BF16, False, BF16),
    "fp32": (FP32, FP32, False, FP32),
    "fp32 to bf16": (FP32, FP32, False, BF16),
    "fp32 with bf16 differences": (FP32, BF16, True, FP32),
    "bf16 with bf16 differences": (BF16, BF16, True, BF16),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@each_divergence
@each_kind
@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("vocabulary", "temperature", "beta"), [(151_936, 1.0, 0.5), (32_000, 0.7, 0.1), (4_999, 1.5, 0.9)]
)
def test_error_is_at_most_twice_torchs(divergence, kind, distance, vocabulary, temperature, beta):
    student, teacher, logits = pair(4, vocabulary, kind, distance=distance, device="cuda")
    divergence = replace(divergence, beta=beta, temperature=temperature)
    found = value_and_gradient(student, teacher, kind, divergence)
    check(found, student, logits, kind, distance, divergence)


@each_divergence
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("vocabulary", [1, 7, 4104, 50_257, 400_001, 1_200_000])
def test_any_vocabulary(divergence, dtype, vocabulary):
    kind = (dtype, dtype, False, dtype)
    student, teacher, logits = pair(2, vocabulary, kind, device="cuda")
    found = value_and_gradient(student, teacher, kind, divergence)
    exact = reference(student.double(), logits, divergence)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-2, atol=1e-6)


@each_divergence
@each_kind
def test_equal_rows_give_exactly_zero_and_bits_repeat(divergence, kind):
    student, teacher, _ = pair(3, 20_003, kind, distance=0.0, device="cuda")
    values, gradient = value_and_gradient(student, teacher, kind, replace(divergence, beta=0.3))
    assert torch.count_nonzero(values) == 0 and torch.count_nonzero(gradient) == 0
    student, teacher, _ = pair(300, 20_000, kind, device="cuda")
    first = value_and_gradient(student, teacher, kind, divergence)
    for _ in range(5):
        again = value_and_gradient(student, teacher, kind, divergence)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    alone = value_and_gradient(student[17:18], teacher[17:18], kind, divergence)
    assert torch.equal(alone[0], first[0][17:18]) and torch.equal(alone[1], first[1][17:18])


@each_divergence
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_minus_infinity_and_nan(divergence, dtype):
    kind = (dtype, dtype, False, dtype)
    student, teacher, _ = pair(4, 10_000, kind, device="cuda")
    student[:, 8000:], teacher[:, 8000:] = -torch.inf, -torch.inf
    student[0, :300], teacher[0, 300:700] = -torch.inf, -torch.inf
    values, gradient = value_and_gradient(student, teacher, kind, divergence)
    expected = reference(student.float(), teacher.float(), divergence)
    torch.testing.assert_close(values, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.float(), expected[1], rtol=2e-2, atol=1e-5)
    assert torch.count_nonzero(gradient[:, 8000:]) == 0
    student[1], student[2, 5], teacher[3, 9999] = -torch.inf, torch.nan, torch.inf
    values, gradient = value_and_gradient(student, teacher, kind, divergence)
    assert values.isnan().tolist() == gradient.isnan().any(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_layouts_scales_in_place_and_rows_out_of_range(dtype):
    kind = (dtype, dtype, False, dtype)
    student, teacher, _ = pair(6, 30_001, kind, device="cuda")
    rows = torch.tensor([5, 0, 2], device="cuda"), torch.tensor([1, 4, 4], device="cuda")
    expected = value_and_gradient(student[rows[0]], teacher[rows[1]], kind)
    padded = torch.full((6, 30_100), torch.nan, device="cuda").to(dtype)
    padded[:, 3:30_004] = teacher
    scales = torch.tensor([2.0, 0.0, -0.5], device="cuda")
    found = value_and_gradient(student, padded[:, 3:30_004], kind, rows=rows, scales=scales)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], (expected[1].float() * scales[:, None]).to(dtype))
    own = student.clone()
    value_and_gradient(own, padded[:, 3:30_004], kind, rows=rows, in_place=True)
    assert torch.equal(own[rows[0]], expected[1]) and torch.equal(own[[1, 3, 4]], student[[1, 3, 4]])
    outside = torch.tensor([0, 6, 1], device="cuda"), torch.tensor([0, 0, -1], device="cuda")
    values, gradient = value_and_gradient(student, teacher, kind, rows=outside)
    assert values.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, True]


@each_divergence
@each_kind
def test_shards_add_up_to_the_whole(divergence, kind):
    student, teacher, logits = pair(3, 30_000, kind, device="cuda")
    rows = (torch.arange(3, device="cuda"),) * 2
    divergence = replace(divergence, beta=0.3, temperature=0.8)
    shared = {"divergence": divergence, "teacher_is_difference": kind[2]}
    parts = [
        (student[:, s], teacher[:, s]) for s in (slice(0, 7000), slice(7000, 20_011), slice(20_011, 30_000))
    ]
    local = [calls.jsd_normalisers(*part, *rows, **shared) for part in parts]
    normalisers = torch.stack(local).logsumexp(0)
    sums = sum(calls.jsd_sums(*part, *rows, normalisers=normalisers, **shared) for part in parts)
    steps = shared | {"normalisers": normalisers, "sums": sums, "gradient_dtype": kind[3]}
    gradient = torch.cat([calls.jsd_gradient(*part, *rows, **steps) for part in parts], -1)
    check((sums[:, 0].float(), gradient), student, logits, kind, 0.5, divergence)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_through_the_door(dtype):
    student, teacher, _ = pair(8, 5000, (dtype, dtype, False, dtype), distance=1.0, device="cuda")
    rows = torch.tensor([6, 1, 6, 3], device="cuda"), torch.tensor([0, 4, 4, 7], device="cuda")
    weights = torch.tensor([2.0, 0.0, 0.5, -1.0], device="cuda")
    divergence, found = replace(JSD, beta=0.4, temperature=1.1), {}
    for impl in ("cuda", "auto", "torch"):
        logits = student.clone().requires_grad_()
        values = jsd_rows(logits, teacher, *rows, weights, divergence=divergence, impl=impl).values
        values.sum().backward()
        found[impl] = values.detach(), logits.grad
    assert torch.equal(found["cuda"][0], found["auto"][0]) and torch.equal(found["cuda"][1], found["auto"][1])
    torch.testing.assert_close(found["cuda"][0], found["torch"][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["cuda"][1], found["torch"][1], rtol=2e-2, atol=1e-6)
    nothing = torch.zeros(0, dtype=torch.long, device="cuda")
    logits = student.clone().requires_grad_()
    empty = torch.zeros(0, device="cuda")
    jsd_rows(logits, teacher, nothing, nothing, empty, divergence=JSD).values.sum().backward()
    assert torch.count_nonzero(logits.grad) == 0


def test_operators_pass_torchs_own_check_and_compile():
    student, teacher, _ = pair(5, 70, KINDS["fp32"], device="cuda")
    rows = torch.tensor([4, 1, 1], device="cuda"), torch.tensor([0, 2, 3], device="cuda")
    arguments = (
        student.requires_grad_(),
        teacher,
        *rows,
        torch.ones(3, device="cuda"),
        "jsd",
        0.5,
        1.0,
        True,
    )
    torch.library.opcheck(torch_ops.divergence_op, arguments)
    torch.library.opcheck(torch_ops.scatter_rows, (teacher[:3], rows[0], torch.ones(3, device="cuda"), 6))


def test_nothing_waits_for_the_device():
    student, teacher, _ = pair(4, 5000, KINDS["bf16"], device="cuda")
    rows, weights = (torch.arange(4, device="cuda"),) * 2, torch.ones(4, device="cuda")
    logits = student.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = jsd_rows(logits, teacher, *rows, weights, divergence=JSD, impl="cuda").values
        values.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_and_a_captured_graph():
    student, teacher, _ = pair(4, 5000, KINDS["bf16"], device="cuda")
    expected = value_and_gradient(student, teacher, KINDS["bf16"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = value_and_gradient(student, teacher, KINDS["bf16"])
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found[1], expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradient(student, teacher, KINDS["bf16"])
    graph.replay()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
