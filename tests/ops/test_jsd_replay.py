"""The CUDA kernels' own bodies, run on a host thread by thread (tests/ops/replay), against float64 and
against torch.

Blocks, clusters, barriers, shuffles, copies and merges are the kernels'; powers and logarithms carry the
largest error that the hardware may make. What a host cannot show: the hardware's own memory ordering, and
speed.
"""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sd.ops.native import calls, cuda_library
from tests.ops.divergences import each_divergence
from tests.ops.jsd_cases import BF16, FP32, check, pair, reference, value_and_gradient

REPLAY = Path(__file__).parent / "replay/replay.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++")
KINDS = [(BF16, BF16, False, BF16), (FP32, FP32, False, FP32), (FP32, FP32, False, BF16), (BF16, BF16, False, FP32),
         (FP32, BF16, True, FP32), (FP32, BF16, True, BF16), (BF16, BF16, True, BF16)]  # fmt: skip
each_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda k: f"{k[0]}-{k[1]}{'-difference' * k[2]}-{k[3]}".replace("torch.", "")
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if not COMPILER:
        pytest.skip("no C++ compiler on this machine")
    path = tmp_path_factory.mktemp("replay") / "replay.so"
    options = ["-std=c++17", "-O2", "-DJSD_REPLAY", "-ffp-contract=fast", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *options, str(REPLAY), "-o", str(path)], check=True, timeout=600)
    library, missing = cuda_library.load(path)
    assert missing == ""
    library.replay_configure.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32]
    return library


@pytest.fixture
def replay(library, monkeypatch):
    """Puts the replay in the GPU library's place; call it to choose the geometry."""
    monkeypatch.setattr(cuda_library, "LIBRARY", library)
    monkeypatch.setattr(cuda_library, "place", lambda device: (0, None))
    monkeypatch.setattr(calls, "_backend", lambda device: cuda_library)

    def configure(*, clusters=True, max_blocks=8, part_bytes=112 * 1024, seed=0):
        library.replay_configure(clusters, max_blocks, part_bytes, seed)

    configure()
    return configure


@each_divergence
@each_kind
@pytest.mark.parametrize(
    ("distance", "temperature", "beta"),
    [(0.01, 1.0, 0.5), (0.3, 0.7, 0.1), (1.0, 1.0, 0.5), (10.0, 1.5, 0.9)],
)
def test_error_is_at_most_twice_torchs(replay, divergence, kind, distance, temperature, beta):
    """A cluster of two blocks, the second's part shorter."""
    replay(part_bytes=16 * 1024)
    vocabulary = 4104 if kind[0] == BF16 else 2568
    student, teacher, logits = pair(2, vocabulary, kind, distance=distance)
    divergence = replace(divergence, beta=beta, temperature=temperature)
    found = value_and_gradient(student, teacher, kind, divergence)
    check(found, student, logits, kind, distance, divergence)


@each_divergence
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[5]], ids=["bf16", "fp32", "difference"])
@pytest.mark.parametrize("vocabulary", [1, 7, 512, 4099, 9001])
def test_any_vocabulary_and_any_cut_give_the_same_within_rounding(replay, divergence, kind, vocabulary):
    """One block, a cluster of several, and the split kernels; where rows end within a vector copies are
    element by element."""
    student, teacher, logits = pair(2, vocabulary, kind, distance=0.5, seed=vocabulary)
    cuts = [{}, {"part_bytes": 3000 + 2 * vocabulary}, {"clusters": False}]
    for cut in cuts:
        replay(**cut)
        found = value_and_gradient(student, teacher, kind, divergence)
        if vocabulary == 1:
            assert found[0].abs().max() <= 1e-6 and found[1].abs().max() <= 1e-6
        else:
            check(found, student, logits, kind, 0.5, divergence)


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=["bf16", "fp32"])
def test_bits_depend_neither_on_the_order_of_threads_nor_on_neighbours(replay, kind, clusters):
    student, teacher, _ = pair(3, 5120, kind)
    found = []
    for seed in range(3):
        replay(clusters=clusters, part_bytes=12 * 1024, seed=seed)
        found.append(value_and_gradient(student, teacher, kind))
    alone = [value_and_gradient(student[i : i + 1], teacher[i : i + 1], kind) for i in range(3)]
    found.append(tuple(torch.cat(column) for column in zip(*alone, strict=True)))
    for values, gradient in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(gradient, found[0][1])


@each_divergence
@each_kind
@pytest.mark.parametrize("clusters", [True, False])
def test_equal_rows_give_exactly_zero(replay, divergence, kind, clusters):
    replay(clusters=clusters, part_bytes=6000)
    student, teacher, _ = pair(2, 1003, kind, distance=0.0)
    values, gradient = value_and_gradient(
        student, teacher, kind, replace(divergence, beta=0.3, temperature=0.7)
    )
    assert torch.count_nonzero(values) == 0 and torch.count_nonzero(gradient) == 0


@each_divergence
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=["bf16", "fp32"])
@pytest.mark.parametrize("clusters", [True, False])
def test_minus_infinity(replay, divergence, kind, clusters):
    """Masked in both: a smaller vocabulary. In one: as torch. All masked, a NaN or +inf: NaN, in that row
    alone."""
    replay(clusters=clusters, part_bytes=4000)
    student, teacher, _ = pair(5, 1030, kind)
    smaller = value_and_gradient(
        student[:, :800].contiguous(), teacher[:, :800].contiguous(), kind, divergence
    )
    student[:, 800:], teacher[:, 800:] = -torch.inf, -torch.inf
    values, gradient = value_and_gradient(student, teacher, kind, divergence)
    torch.testing.assert_close(values, smaller[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(
        gradient[:, :800], smaller[1], rtol=2e-2 if kind[3] == BF16 else 1e-5, atol=1e-9
    )
    assert torch.count_nonzero(gradient[:, 800:]) == 0
    # the first vectors of some threads: their sums start again
    student[0, :40], teacher[1, 40:90] = -torch.inf, -torch.inf
    found = value_and_gradient(student, teacher, kind, divergence)
    expected = reference(student.float(), teacher.float(), divergence)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1].float(), expected[1], rtol=2e-2, atol=1e-5)
    student[1] = -torch.inf
    student[2, 7] = torch.nan
    teacher[3, 1029] = torch.inf
    values, gradient = value_and_gradient(student, teacher, kind, divergence)
    assert values.isnan().tolist() == [False, True, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, True, False]


@each_divergence
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[4]], ids=["bf16", "fp32", "difference"])
def test_huge_logits_are_float64s(replay, divergence, kind):
    student = (
        torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4], [200.0, 0.0, 0.0], [0.0, 90.0, 0.0]])
        .repeat(1, 101)
        .to(kind[0])
    )
    logits = torch.tensor([[-1e4, 1e4, 0.0], [3e4, 0.0, -3e4], [0.0, 200.0, 0.0], [0.0, 0.0, 99.0]]).repeat(
        1, 101
    )
    teacher = (logits - student.float() if kind[2] else logits).to(kind[1])
    logits = teacher.double() + student.double() if kind[2] else teacher.double()
    expected = reference(student.double(), logits, divergence)
    for clusters in (True, False):
        replay(clusters=clusters, part_bytes=4000)
        found = value_and_gradient(student, teacher, kind, divergence)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=3e-5, atol=1e-6)
        rounding = 1e-8 * expected[0].max().item()  # of scores as large as the value, in float32
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-2, atol=1e-5 + rounding)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e20, -1e30, torch.finfo(BF16).min])
@pytest.mark.parametrize("clusters", [True, False])
def test_any_large_negative_number_masks(replay, mask, clusters):
    """Also where it is all that a thread sees."""
    replay(clusters=clusters)
    for kind in (KINDS[0], KINDS[1], KINDS[5]):
        student, teacher, logits = pair(1, 9000, kind)
        student[:, 3000:], teacher[:, 3000:], logits[:, 3000:] = mask, 0.0 if kind[2] else mask, mask
        values, gradient = value_and_gradient(student, teacher, kind)
        expected = reference(student[:, :3000].double(), logits[:, :3000])
        torch.testing.assert_close(values.double(), expected[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient[:, :3000].double(), expected[1], rtol=1e-2, atol=1e-8)
        assert torch.count_nonzero(gradient[:, 3000:]) == 0


def test_one_high_entry_after_a_threads_first_vector(replay):
    """The thread's sum overflows against its first reference and is taken again against the true maximum."""
    for kind in (KINDS[0], KINDS[1]):
        student, teacher, logits = pair(2, 12288, kind)
        student[0, 9000], teacher[1, 9001] = 300.0, 250.0
        for clusters in (True, False):
            replay(clusters=clusters)
            values, gradient = value_and_gradient(student, teacher, kind)
            expected = reference(student.double(), teacher.double())
            torch.testing.assert_close(values.double(), expected[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-2, atol=1e-6)


@each_divergence
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_listed_rows_scales_layouts_and_in_place(replay, divergence, clusters, dtype):
    """Strided and misaligned matrices, repeated rows, factors, and gradients over the student's own rows."""
    replay(clusters=clusters, part_bytes=6000)
    kind = (dtype, dtype, False, dtype)
    student, teacher, _ = pair(6, 1003, kind)
    rows = torch.tensor([5, 0, 2]), torch.tensor([1, 4, 4])
    expected = value_and_gradient(student[rows[0]], teacher[rows[1]], kind, divergence)
    scales = torch.tensor([2.0, 0.0, -0.5])
    padded = torch.full((6, 1100), torch.nan).to(dtype)
    padded[:, 3:1006] = teacher
    found = value_and_gradient(student, padded[:, 3:1006], kind, divergence, rows=rows, scales=scales)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], (expected[1].float() * scales[:, None]).to(dtype))
    own = student.clone()
    values, gradient = value_and_gradient(own, padded[:, 3:1006], kind, divergence, rows=rows, in_place=True)
    assert torch.equal(values, expected[0]) and gradient.data_ptr() == own.data_ptr()
    assert torch.equal(own[rows[0]], expected[1]) and torch.equal(own[[1, 3, 4]], student[[1, 3, 4]])


@pytest.mark.parametrize("clusters", [True, False])
def test_rows_out_of_range_are_nan_and_touch_nothing(replay, clusters):
    replay(clusters=clusters, part_bytes=3000)
    student, teacher, _ = pair(3, 520, KINDS[0])
    rows = torch.tensor([0, 3, 1]), torch.tensor([0, 0, -1])
    values, gradient = value_and_gradient(student, teacher, KINDS[0], rows=rows)
    assert values.isnan().tolist() == [False, True, True]
    assert gradient.isnan().all(-1).tolist() == [False, True, True]


@each_divergence
@each_kind
def test_shards_add_up_to_the_whole(replay, divergence, kind):
    """The three steps of a sharded vocabulary, three shards of unequal size, against the whole at once."""
    student, teacher, logits = pair(3, 1500, kind)
    rows = (torch.arange(3),) * 2
    divergence = replace(divergence, beta=0.3, temperature=0.8)
    shared = {"divergence": divergence, "teacher_is_difference": kind[2]}
    shards = [slice(0, 700), slice(700, 1203), slice(1203, 1500)]
    parts = [(student[:, s], teacher[:, s]) for s in shards]
    local = [calls.jsd_normalisers(*part, *rows, **shared) for part in parts]
    normalisers = torch.stack(local).logsumexp(0)
    torch.testing.assert_close(
        normalisers[:, 0], (student.double() / 0.8).logsumexp(-1), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(normalisers[:, 1], (logits / 0.8).logsumexp(-1), rtol=1e-7, atol=1e-7)
    sums = sum(calls.jsd_sums(*part, *rows, normalisers=normalisers, **shared) for part in parts)
    gradient = torch.cat([
        calls.jsd_gradient(*part, *rows, normalisers=normalisers, sums=sums, gradient_dtype=kind[3], **shared)
        for part in parts
    ], -1)  # fmt: skip
    check((sums[:, 0].float(), gradient), student, logits, kind, 0.5, divergence)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("vocabulary", [4, 1031, 4096])
def test_scattered_rows_are_scaled_and_summed_in_list_order(replay, dtype, vocabulary):
    replay()
    gradient = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows, scales = torch.tensor([3, 1, 3, 0]), torch.tensor([0.5, 2.0, -1.0, 1.0])
    out = calls.scatter_rows(gradient, rows, scales, num_rows=5)
    expected = torch.zeros(5, vocabulary).index_add(0, rows, gradient.float() * scales[:, None]).to(dtype)
    torch.testing.assert_close(out, expected, rtol=1e-2 if dtype == BF16 else 1e-6, atol=0)
    assert torch.count_nonzero(out[2]) == 0 and torch.count_nonzero(out[4]) == 0
