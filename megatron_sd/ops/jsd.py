"""The one door to the divergence of listed rows; `impl` names who computes it."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from megatron_sd.errors import ConfigError
from megatron_sd.ops.divergence import ROW_DIVERGENCES, Divergence
from megatron_sd.ops.jsd_in_place import in_place_rows
from megatron_sd.ops.jsd_reference import RowDivergence, divergence_rows
from megatron_sd.ops.native import calls, cpu_library, cuda_library, torch_ops

_LOG = logging.getLogger(__name__)

ROW_DTYPES = (torch.int64, torch.int32)
IMPLEMENTATIONS = ("auto", "torch", "cpp", "cuda")
NATIVE_DEVICES = {"cpp": "cpu", "cuda": "cuda"}


def jsd_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence,
    in_place: bool = False,
    impl: str = "auto",
) -> RowDivergence:
    """weights[i] * D(teacher_logits[teacher_rows[i]], student_logits[student_rows[i]]) for every i.

    student_logits [S, V], teacher_logits [T, V]: any floating dtype, arithmetic in float32 (float64 stays
    float64). student_rows, teacher_rows: [N] integer; only these rows are touched. weights: [N] floating,
    no gradient. Returns [N] values in the arithmetic's dtype, differentiable in student_logits alone, and
    the [N] truncated masses. N = 0 is fine. divergence: D, and what it is taken with. in_place: the
    gradient takes the place of student_logits, which are lost (rows not listed become 0), and the backward
    can run once; without a gradient nothing is written. That saves the [S, V] gradient, and is refused
    where it would corrupt something. impl: "cpp" and "cuda" are the native code of kernels/csrc (float32 or
    bfloat16, full vocabulary, no entry_clip) on CPU and on CUDA tensors, "torch" is the reference, "auto"
    the native code where it can and otherwise the reference, said once in the log. Raises ConfigError for
    an impl that this build has not or a top_k above V, and ValueError for tensors that do not fit; row
    indices are checked only where that costs no device synchronisation (on the CPU; the CUDA code makes
    rows out of range NaN). NaN in a row's logits is NaN in its value, and on the CPU a warning with the
    row's number.
    """
    _check_impl(impl)
    if divergence.kind not in ROW_DIVERGENCES:
        raise ConfigError(f"distill.divergence is {divergence.kind!r}, expected one of {ROW_DIVERGENCES}")
    _check_tensors(student_logits, teacher_logits, student_rows, teacher_rows, weights)
    divergence.check_vocabulary(student_logits.shape[-1])
    chosen = _chosen(impl, student_logits, teacher_logits, divergence)
    compute = functools.partial(_reference_rows if chosen == "torch" else _native_rows, divergence=divergence)
    lists = (student_rows, teacher_rows, weights.detach())
    if in_place and student_logits.requires_grad and torch.is_grad_enabled():
        return in_place_rows(compute, student_logits, teacher_logits.detach(), lists)
    return compute(student_logits, teacher_logits.detach(), *lists)


def _native_rows(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence,
) -> RowDivergence:
    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    values, _ = torch_ops.divergence_op(
        student,
        teacher,
        student_rows,
        teacher_rows,
        weights.float(),
        divergence.kind,
        divergence.beta,
        divergence.temperature,
        wants_gradient,
    )
    scaled = values if divergence.scale == 1.0 else values * divergence.scale  # no second [N, V] gradient
    return RowDivergence(scaled, torch.zeros_like(values))


def _reference_rows(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    weights: Tensor,
    *,
    divergence: Divergence,
) -> RowDivergence:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    result = divergence_rows(student[student_rows].to(dtype), teacher[teacher_rows].to(dtype), divergence)
    if student.device.type == "cpu" and not torch.compiler.is_compiling():
        torch_ops.warn_of_nan(result.values, student_rows, teacher_rows)
    return RowDivergence(result.values * weights.to(dtype), result.truncated_mass)


def _chosen(impl: str, student: Tensor, teacher: Tensor, divergence: Divergence) -> str:
    """ "cpp", "cuda" or "torch". Raises ValueError if impl is a native one and these tensors or this
    divergence are not for it."""
    if impl == "torch":
        return impl
    obstacle = calls.obstacle(student, teacher, divergence, teacher_is_difference=False)
    if impl != "auto" and student.device.type != NATIVE_DEVICES[impl]:
        obstacle = f"tensors on {student.device}"
    if impl != "auto" and obstacle:
        expected = (
            f"{NATIVE_DEVICES[impl].upper()} tensors of float32 or bfloat16, no top_k, no entry_clip and no"
            " mse, or impl='auto'"
        )
        raise ValueError(f"impl={impl!r} cannot serve {obstacle}; expected {expected}")
    if impl != "auto":
        return impl
    chosen = "torch" if obstacle else "cuda" if student.is_cuda else "cpp"
    if not torch.compiler.is_compiling():
        _say_once(
            chosen,
            obstacle or (cuda_library.architectures() if chosen == "cuda" else cpu_library.INSTRUCTION_SET),
        )
    return chosen


@functools.cache
def _say_once(chosen: str, reason: str) -> None:
    _LOG.info("divergence of rows: impl='auto' takes %r (%s)", chosen, reason)


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"impl is {impl!r}, expected one of {IMPLEMENTATIONS}")
    libraries = {"cpp": cpu_library, "cuda": cuda_library}
    if impl in libraries and libraries[impl].LIBRARY is None:
        raise ConfigError(
            f"impl={impl!r} is not part of this build, expected 'auto' or 'torch': {libraries[impl].MISSING}"
        )


def _check_tensors(
    student: Tensor, teacher: Tensor, student_rows: Tensor, teacher_rows: Tensor, weights: Tensor
) -> None:
    if student.ndim != 2 or teacher.ndim != 2:
        raise ValueError(
            f"logits have shapes {tuple(student.shape)} and {tuple(teacher.shape)}, expected [rows,"
            " vocabulary]"
        )
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's vocabulary has {student.shape[1]} entries and the teacher's {teacher.shape[1]}: "
            "expected the same; cut or pad one of the heads to the tokenizer's size"
        )
    if not student_rows.shape == teacher_rows.shape == weights.shape or student_rows.ndim != 1:
        raise ValueError(
            f"student_rows, teacher_rows and weights have shapes {tuple(student_rows.shape)},"
            f" {tuple(teacher_rows.shape)} and {tuple(weights.shape)}, expected three times [N]"
        )
    if student_rows.dtype not in ROW_DTYPES or teacher_rows.dtype not in ROW_DTYPES:
        found = f"{student_rows.dtype} and {teacher_rows.dtype}"
        raise ValueError(f"student_rows and teacher_rows are {found}, expected int64 or int32")
    devices = {str(t.device) for t in (student, teacher, student_rows, teacher_rows, weights)}
    if len(devices) > 1:
        raise ValueError(f"the tensors lie on {sorted(devices)}, expected one device")
    if student.device.type == "cpu" and not torch.compiler.is_compiling():
        torch_ops.check_rows("student_rows", student_rows, len(student))
        torch_ops.check_rows("teacher_rows", teacher_rows, len(teacher))
