"""The native divergence as torch operators: autograd, fake tensors for torch.compile, and the check of the
row numbers.

megatron_sd::jsd_rows computes values and gradients of the listed rows together; megatron_sd::scatter_rows
is its backward, which lays the gradients, times what comes from above, into a matrix of the student logits'
shape.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.native import calls

_LOG = logging.getLogger(__name__)


@torch.library.custom_op("megatron_sd::jsd_rows", mutates_args=(), device_types=("cpu", "cuda"))
def divergence_op(  # noqa: PLR0913, PLR0917 (an operator's schema)
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    weights: Tensor,
    kind: str,
    beta: float,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """calls.native_divergence, values and gradients times weights [N].

    Checked: ValueError for row numbers out of range, and a warning that names rows that come out as NaN. On
    CUDA both would wait for the device: they happen only under torch.autograd.set_detect_anomaly(True), and
    rows out of range give NaN.
    """
    checked = _is_checked(student.device)
    if checked:
        check_rows("student_rows", student_rows, len(student))
        check_rows("teacher_rows", teacher_rows, len(teacher))
    values, gradient = calls.native_divergence(
        student,
        teacher,
        student_rows,
        teacher_rows,
        divergence=Divergence(kind=kind, beta=beta, temperature=temperature),
        with_gradient=with_gradient,
        scales=weights,
    )
    if checked:
        warn_of_nan(values, student_rows, teacher_rows)
    return values * weights, gradient


@divergence_op.register_fake
def _(student, teacher, student_rows, teacher_rows, weights, kind, beta, temperature, with_gradient):  # noqa: PLR0913, PLR0917
    num_rows = student_rows.shape[0]
    values = student.new_empty(num_rows, dtype=torch.float32)
    return values, student.new_empty(num_rows if with_gradient else 0, student.shape[1])


@torch.library.custom_op("megatron_sd::scatter_rows", mutates_args=(), device_types=("cpu", "cuda"))
def scatter_rows(gradient: Tensor, rows: Tensor, scales: Tensor, num_rows: int) -> Tensor:
    """calls.scatter_rows, its rows checked on CPUs (on CUDA, those out of range are left out)."""
    if _is_checked(gradient.device):
        check_rows("rows", rows, num_rows)
    return calls.scatter_rows(gradient, rows, scales, num_rows=num_rows)


@scatter_rows.register_fake
def _(gradient, rows, scales, num_rows):
    return gradient.new_empty(num_rows, gradient.shape[1])


def _is_checked(device: torch.device) -> bool:
    return device.type == "cpu" or torch.is_anomaly_enabled()


def check_rows(name: str, rows: Tensor, size: int) -> None:
    """Raises ValueError unless every one of the integer `rows` lies in 0..size - 1."""
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise ValueError(f"{name} spans {int(rows.min())}..{int(rows.max())}, expected 0..{size - 1}")


def warn_of_nan(values: Tensor, student_rows: Tensor, teacher_rows: Tensor) -> None:
    """A line in the log if divergences [N] of these rows [N] are NaN."""
    if not values.isnan().any():
        return
    index = int(values.isnan().nonzero()[0, 0])
    _LOG.warning(
        "%d of %d divergences are NaN, first that of student row %d and teacher row %d: one of the rows"
        " holds a NaN, +inf, or nothing but -inf",
        int(values.isnan().sum()),
        len(values),
        int(student_rows[index]),
        int(teacher_rows[index]),
    )


def _keep(ctx, inputs, output) -> None:
    student, student_rows = inputs[0], inputs[2]
    ctx.num_student_rows = student.shape[0]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], student_rows)


def _backward(ctx, grad_values: Tensor | None, _grad_gradient: None):
    gradient, student_rows = ctx.saved_tensors
    grad_student = None
    if grad_values is not None and ctx.needs_input_grad[0]:
        if _is_finished(gradient, student_rows, grad_values, ctx.num_student_rows):
            grad_student = gradient
        else:
            grad_student = scatter_rows(gradient, student_rows, grad_values, ctx.num_student_rows)
    return grad_student, None, None, None, None, None, None, None, None


def _is_finished(gradient: Tensor, rows: Tensor, scales: Tensor, num_rows: int) -> bool:
    """Whether `gradient` is the answer as it is (every row in its place, of scale 1) and nobody needs it
    again: who gets it may write into it. Not asked where looking would cost a synchronisation or break a
    graph."""
    if torch.compiler.is_compiling() or gradient.device.type != "cpu" or len(rows) != num_rows:
        return False
    if torch._C._autograd._get_current_graph_task_keep_graph():  # noqa: SLF001 (retain_graph has no public name)
        return False
    return torch.equal(rows, torch.arange(num_rows, dtype=rows.dtype)) and bool((scales == 1.0).all())


divergence_op.register_autograd(_backward, setup_context=_keep)
