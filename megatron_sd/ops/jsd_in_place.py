"""A divergence whose gradient takes the place of the student's logits: no second [S, V] matrix.

Works with any implementation: a few rows at a time are copied out, their gradient is taken, and written back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sd.ops.jsd_reference import RowDivergence

BLOCK_ELEMENTS = 1 << 20  # logits that are copied out at one time: a few rows of a large vocabulary

# Of student, teacher, student_rows, teacher_rows and weights.
Compute = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], RowDivergence]


def in_place_rows(
    compute: Compute, student: Tensor, teacher: Tensor, lists: tuple[Tensor, Tensor, Tensor]
) -> RowDivergence:
    """compute(student, teacher, *lists), with the gradient kept in `student` [S, V] between forward and
    backward.

    lists: the student's rows, the teacher's and the weights, [N] each. What is listed in the student's
    becomes that row's gradient, what is not becomes 0. Raises ValueError where that would lose or corrupt
    something (one device synchronisation), and RuntimeError from a second backward. Whatever else has kept
    the logits for its own backward is told by autograd.
    """
    _check(student, teacher, lists[0])
    return RowDivergence(*_InPlace.apply(student, compute, teacher, *lists))


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (autograd hands everything on by position)
        ctx,
        student: Tensor,
        compute: Compute,
        teacher: Tensor,
        student_rows: Tensor,
        teacher_rows: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        block_rows = max(BLOCK_ELEMENTS // student.shape[1], 1)
        is_listed = torch.zeros(len(student), dtype=torch.bool, device=student.device).index_fill(
            0, student_rows.long(), True
        )
        parts = []
        for own, others, shares in zip(
            *(part.split(block_rows) for part in (student_rows, teacher_rows, weights)), strict=True
        ):
            with torch.enable_grad():
                logits = student.detach()[own].requires_grad_()
                result = compute(logits, teacher, torch.arange(len(own), device=own.device), others, shares)
                (gradient,) = torch.autograd.grad(result.values.sum(), logits)
            student.index_copy_(0, own.long(), gradient)
            parts.append((result.values.detach(), result.truncated_mass))
        student.masked_fill_(~is_listed[:, None], 0.0)
        values, truncated_mass = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(truncated_mass)
        ctx.save_for_backward(student, student_rows)
        ctx.is_spent = False
        return values, truncated_mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor, _grad_mass: Tensor):
        if ctx.is_spent:
            raise RuntimeError(
                "in_place=True keeps one gradient for one backward; for a second one expected in_place=False"
            )
        ctx.is_spent = True
        student, student_rows = ctx.saved_tensors
        scales = grad_values.new_zeros(len(student)).index_copy(0, student_rows.long(), grad_values)
        return student.detach().mul_(scales[:, None]), None, None, None, None, None


def _check(student: Tensor, teacher: Tensor, student_rows: Tensor) -> None:
    if torch.compiler.is_compiling():
        _refuse("is inside torch.compile", "the call outside of the compiled function")
    if student.is_leaf:
        _refuse("would overwrite student_logits, a leaf whose values the caller owns", "a head's output")
    if not student.is_contiguous():
        _refuse(f"writes whole rows, and student_logits has strides {student.stride()}", "contiguous rows")
    (first, last), (other_first, other_last) = _extent(student), _extent(teacher)
    if first < other_last and other_first < last:
        _refuse("would overwrite teacher_logits: they share memory with the student's", "a copy")
    num_repeated = len(student_rows) - len(student_rows.unique())
    if num_repeated:
        _refuse(f"keeps one gradient a row, and student_rows repeats {num_repeated}", "each row once")


def _refuse(reason: str, remedy: str) -> None:
    raise ValueError(f"in_place=True {reason}; expected in_place=False, or {remedy}")


def _extent(matrix: Tensor) -> tuple[int, int]:
    """Addresses of the first element and of the end; equal for an empty matrix."""
    if matrix.numel() == 0:
        return (matrix.data_ptr(),) * 2
    last = sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix.data_ptr(), matrix.data_ptr() + (last + 1) * matrix.element_size()
