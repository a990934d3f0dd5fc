"""Cases and the error rule that the CUDA kernels are held to, on a GPU (test_jsd_cuda.py) and on a host
(test_jsd_replay.py)."""

import torch

from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.ops.native import calls
from tests.ops.divergences import JSD

BF16, FP32 = torch.bfloat16, torch.float32
# four hardware powers of 2^-22 meet in a result; two roundings of the stored gradient
EPS = {FP32: 1e-6, BF16: 4e-3}

# A kind: (student dtype, teacher dtype, the teacher's matrix holds differences, gradient dtype).


def pair(num_rows, vocabulary, kind, *, distance=0.5, seed=0, device="cpu"):
    """(student, the teacher's matrix, the teacher's logits in float64)."""
    generator = torch.Generator(device).manual_seed(seed)
    student = (3.0 * torch.randn(num_rows, vocabulary, generator=generator, device=device)).to(kind[0])
    difference = distance * torch.randn(num_rows, vocabulary, generator=generator, device=device)
    teacher = (difference if kind[2] else student.float() + difference).to(kind[1])
    return student, teacher, student.double() * kind[2] + teacher.double()


def value_and_gradient(student, teacher, kind, divergence=JSD, *, rows=None, **options):
    """Of the native code; rows: all in order unless given."""
    rows = rows or (torch.arange(len(student), device=student.device),) * 2
    return calls.native_divergence(
        student,
        teacher,
        *rows,
        divergence=divergence,
        with_gradient=True,
        gradient_dtype=kind[3],
        teacher_is_difference=kind[2],
        **options,
    )


def reference(student, teacher, divergence=JSD):
    """(values, gradient) by autograd, in the dtype of the logits."""
    student = student.clone().requires_grad_()
    values = divergence_rows(student, teacher, divergence).values
    values.sum().backward()
    return values.detach(), student.grad


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(found, student, logits, kind, distance, divergence=JSD):
    """err(kernel) <= 2 err(torch in float32) + eps. Below a hundred entries one hardware power's error does
    not average out."""
    exact, exact_gradient = reference(student.double(), logits, divergence)
    torch_value, torch_gradient = reference(student.float(), logits.float(), divergence)
    assert found[0].dtype == FP32 and found[1].dtype == kind[3]
    few = student.shape[1] < 100
    value_eps = EPS[FP32] + 2e-8 / distance + few * 2**-22 / exact.norm().item()
    assert relative_error(found[0], exact) <= 2 * relative_error(torch_value, exact) + value_eps
    gradient_eps = (1 + few) * EPS[kind[3]]
    assert (
        relative_error(found[1], exact_gradient)
        <= 2 * relative_error(torch_gradient, exact_gradient) + gradient_eps
    )
