"""The CUDA kernels' own bodies, run on a host thread by thread (tests/replay), against float64 and against torch.

Blocks, clusters, barriers, shuffles, copies and merges are the kernels'; powers and logarithms carry the largest error that
the hardware may make. What a host cannot show: the hardware's own memory ordering, and speed.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_sd.ops import native_cuda, native_rows
from megatron_sd.ops.jsd_reference import divergence_rows

REPLAY = Path(__file__).parent / "replay/replay.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++")
BF16, FP32 = torch.bfloat16, torch.float32
EPS = {FP32: 4e-7, BF16: 4e-3}  # as in test_jsd_native, and a power's 2^-22
DIVERGENCES = ["jsd", "forward_kl", "reverse_kl"]
# (student dtype, teacher dtype, the teacher's matrix holds differences, gradient dtype)
KINDS = [(BF16, BF16, False, BF16), (FP32, FP32, False, FP32), (FP32, FP32, False, BF16), (BF16, BF16, False, FP32),
         (FP32, BF16, True, FP32), (FP32, BF16, True, BF16), (BF16, BF16, True, BF16)]  # fmt: skip
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
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
    library, missing = native_cuda.load(path)
    assert missing == ""
    library.replay_configure.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32]
    return library


@pytest.fixture
def replay(library, monkeypatch):
    """Puts the replay in the GPU library's place; call it to choose the geometry."""
    monkeypatch.setattr(native_cuda, "LIBRARY", library)
    monkeypatch.setattr(native_cuda, "place", lambda device: (0, None))
    monkeypatch.setattr(native_rows, "_backend", lambda device: native_cuda)

    def configure(*, clusters=True, max_blocks=8, part_bytes=112 * 1024, seed=0):
        library.replay_configure(clusters, max_blocks, part_bytes, seed)

    configure()
    return configure


def pair(num_rows, vocabulary, kind, *, distance=0.5, seed=0):
    """(student, the teacher's matrix, the teacher's logits in float64)."""
    generator = torch.Generator().manual_seed(seed)
    student = (3.0 * torch.randn(num_rows, vocabulary, generator=generator)).to(kind[0])
    difference = distance * torch.randn(num_rows, vocabulary, generator=generator)
    teacher = (difference if kind[2] else student.float() + difference).to(kind[1])
    return student, teacher, student.double() * kind[2] + teacher.double()


def value_and_gradient(student, teacher, kind, rows=None, **options):
    rows = rows or (torch.arange(len(student)),) * 2
    options = {"divergence": "jsd", "beta": 0.5, "temperature": 1.0} | options
    return native_rows.jsd_rows(
        student, teacher, *rows, with_gradient=True, gradient_dtype=kind[3], teacher_is_difference=kind[2], **options
    )


def reference(student, teacher, **options):
    """In the dtype of the logits."""
    student = student.clone().requires_grad_()
    options = {"divergence": "jsd", "beta": 0.5, "temperature": 1.0} | options
    values = divergence_rows(student, teacher, top_k=None, **options).values
    values.sum().backward()
    return values.detach(), student.grad


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(found, student, logits, kind, distance, **options):
    """err(kernel) <= 2 err(torch in float32, and in the gradient's dtype as it is stored) + eps."""
    exact, exact_gradient = reference(student.double(), logits, **options)
    torch_value, torch_gradient = reference(student.float(), logits.float(), **options)
    assert found[0].dtype == FP32 and found[1].dtype == kind[3]
    value_eps = EPS[FP32] + 2e-8 / distance
    assert relative_error(found[0], exact) <= 2 * relative_error(torch_value, exact) + value_eps
    assert relative_error(found[1], exact_gradient) <= 2 * relative_error(torch_gradient, exact_gradient) + EPS[kind[3]]


@each_divergence
@each_kind
@pytest.mark.parametrize(
    ("distance", "temperature", "beta"), [(0.01, 1.0, 0.5), (0.3, 0.7, 0.1), (1.0, 1.0, 0.5), (10.0, 1.5, 0.9)]
)
def test_error_is_at_most_twice_torchs(replay, divergence, kind, distance, temperature, beta):
    """A cluster of two blocks, the second's part shorter."""
    replay(part_bytes=16 * 1024)
    vocabulary = 4104 if kind[0] == BF16 else 2568
    student, teacher, logits = pair(2, vocabulary, kind, distance=distance)
    options = {"divergence": divergence, "temperature": temperature, "beta": beta}
    check(value_and_gradient(student, teacher, kind, **options), student, logits, kind, distance, **options)
