"""What a native call gets: ctypes' view of kernels/csrc/jsd_task.h, and the tensors behind its pointers."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sd.ops.divergence import Divergence

NATIVE_DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")  # the library's numbering
NO_DIVERGENCE = -1  # kNoDivergence
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class Matrix(ctypes.Structure):
    """JsdMatrix."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("element_type", ctypes.c_int32),
    ]


class RowsTask(ctypes.Structure):
    """JsdTask."""

    _fields_ = [
        ("student", Matrix),
        ("teacher", Matrix),
        ("gradient", Matrix),
        ("student_rows", ctypes.c_void_p),
        ("teacher_rows", ctypes.c_void_p),
        ("gradient_rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("normalisers", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("beta", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("divergence", ctypes.c_int32),
        ("teacher_is_difference", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


class ScatterTask(ctypes.Structure):
    """JsdScatterTask."""

    _fields_ = [
        ("gradient", Matrix),
        ("out", Matrix),
        ("rows", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


@dataclass(frozen=True, kw_only=True)
class RowPairs:
    """The row pairs of a call: student [S, V] and teacher [T, V] with adjacent columns, float32 or
    bfloat16; student_rows and teacher_rows [N] int64. teacher_is_difference: the teacher's matrix holds its
    logits minus the student's (where the student is -inf it must be finite)."""

    student: Tensor
    teacher: Tensor
    student_rows: Tensor
    teacher_rows: Tensor
    teacher_is_difference: bool

    @classmethod
    def of(  # noqa: PLR0913
        cls,
        student: Tensor,
        teacher: Tensor,
        student_rows: Tensor,
        teacher_rows: Tensor,
        *,
        teacher_is_difference: bool,
    ) -> RowPairs:
        """Bring the tensors into that form, copying only what has to be."""
        return cls(
            student=rows_in_memory(student),
            teacher=rows_in_memory(teacher),
            student_rows=student_rows.to(torch.int64).contiguous(),
            teacher_rows=teacher_rows.to(torch.int64).contiguous(),
            teacher_is_difference=teacher_is_difference,
        )

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.student_rows)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.student.shape[1]

    def task(self, divergence: Divergence | None) -> RowsTask:
        """A task with the inputs filled in; None: of a head that wants no divergence. The pointers are valid
        as long as this object lives. Raises ValueError for a divergence that the library has not."""
        task = RowsTask(
            student=matrix(self.student),
            teacher=matrix(self.teacher),
            student_rows=self.student_rows.data_ptr(),
            teacher_rows=self.teacher_rows.data_ptr(),
            num_rows=self.num_rows,
            vocabulary=self.vocabulary,
            divergence=NO_DIVERGENCE,
            teacher_is_difference=self.teacher_is_difference,
        )
        if divergence is None:
            return task
        if obstacle := divergence_obstacle(divergence):
            raise ValueError(
                f"no native code for {obstacle}, expected one of {NATIVE_DIVERGENCES}, no top_k, no entry_clip"
            )
        task.divergence = NATIVE_DIVERGENCES.index(divergence.kind)
        task.beta, task.temperature = divergence.beta, divergence.temperature
        return task


def divergence_obstacle(divergence: Divergence) -> str:
    """What of the divergence the library has not, "" if it has it."""
    if divergence.kind not in NATIVE_DIVERGENCES:
        return f"divergence={divergence.kind!r}"
    if divergence.entry_clip is not None:
        return f"entry_clip={divergence.entry_clip}"
    return "" if divergence.top_k is None else f"top_k={divergence.top_k}"


def rows_in_memory(tensor: Tensor) -> Tensor:
    """The matrix with adjacent columns; copied only if it has to be."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def matrix(tensor: Tensor) -> Matrix:
    """The library's view of a matrix with adjacent columns."""
    return Matrix(tensor.data_ptr(), tensor.shape[0], tensor.stride(0), ELEMENT_TYPES[tensor.dtype])
