"""What the native libraries compute, on tensors: the same functions on CPUs and CUDA devices, without
autograd. A divergence without native code, mse or one with a top_k, is a ValueError.

native_divergence does everything in one visit to a row. The other three are its steps, for a vocabulary in
shards: normalisers of every shard, combined by logsumexp over shards; sums of every shard with the combined
normalisers, added up; gradient of every shard with both. Row numbers must be in range: on CPUs the caller
has looked, on CUDA such rows come out as NaN.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.native import cpu_library, cuda_library
from megatron_sd.ops.native.structs import (
    ELEMENT_TYPES,
    Matrix,
    RowPairs,
    RowsTask,
    ScatterTask,
    divergence_obstacle,
    matrix,
    rows_in_memory,
)


def obstacle(
    student: Tensor, teacher: Tensor, divergence: Divergence | None, *, teacher_is_difference: bool
) -> str:
    """What keeps the native libraries from this divergence of these matrices, "" if nothing does. None: the
    matrices alone are asked about."""
    if divergence is not None and (unknown := divergence_obstacle(divergence)):
        return unknown
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dtype not in ELEMENT_TYPES:
            return f"{name} logits of {logits.dtype}"
    if student.device.type == "cuda":
        if (student.dtype, teacher.dtype, teacher_is_difference) not in cuda_library.DTYPE_PAIRS:
            held = "differences" if teacher_is_difference else "logits"
            return f"student logits of {student.dtype} beside teacher {held} of {teacher.dtype}"
        return cuda_library.obstacle(student.device.index)
    return cpu_library.MISSING if student.device.type == "cpu" else f"tensors on {student.device}"


def native_divergence(  # noqa: PLR0913 (the whole operation)
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    divergence: Divergence,
    with_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
    scales: Tensor | None = None,
    in_place: bool = False,
    teacher_is_difference: bool = False,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergences [N] float32 of the listed rows, and their gradients [N, V] ([0, V] if not wanted).

    student [S, V], teacher [T, V]: float32 or bfloat16. student_rows, teacher_rows: [N] integer.
    gradient_dtype: float32 or bfloat16, None for the student's. scales: [N], factors of the gradients
    alone. in_place: gradients overwrite the listed student rows, each of which must be listed once, and the
    student is returned. teacher_is_difference: the teacher's matrix holds its logits minus the student's. A
    row that is all -inf, or holds a NaN or +inf, gives NaN in both.
    """
    pairs = RowPairs.of(
        student, teacher, student_rows, teacher_rows, teacher_is_difference=teacher_is_difference
    )
    device, backend = student.device, _backend(student.device)
    task = pairs.task(divergence)
    values = torch.empty(pairs.num_rows, dtype=torch.float32, device=device)
    normalisers, sums = _pair_of_doubles(pairs), _pair_of_doubles(pairs)
    task.values, task.normalisers, task.sums = values.data_ptr(), normalisers.data_ptr(), sums.data_ptr()
    gradient = _gradient(
        pairs, task, with_gradient=with_gradient, dtype=gradient_dtype, in_place=student if in_place else None
    )
    scales = _set_scales(task, scales)
    needs_room = in_place or gradient.dtype != torch.float32
    keeps_scores = with_gradient and divergence.kind != "forward_kl" and needs_room
    scratch = backend.scratch(pairs, task, keeps_scores=keeps_scores)
    task.scratch = None if scratch is None else scratch.data_ptr()
    if pairs.num_rows:
        backend.run("jsd_rows", task, device=device, instruction_set=instruction_set)
    return values, gradient


def jsd_normalisers(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    divergence: Divergence,
    teacher_is_difference: bool = False,
) -> Tensor:
    """Step 1: [N, 2] float64, log sum exp(logit / temperature) of the student's and the teacher's listed
    rows, over the columns given; of the divergence the temperature alone counts. Combine shards with
    torch.logsumexp. A row of nothing but -inf gives -inf; NaN or +inf in a row give NaN."""
    pairs = RowPairs.of(
        student, teacher, student_rows, teacher_rows, teacher_is_difference=teacher_is_difference
    )
    task = pairs.task(divergence)
    normalisers = _pair_of_doubles(pairs)
    task.normalisers = normalisers.data_ptr()
    _run_step("jsd_normalisers", pairs, task)
    return normalisers


def jsd_sums(
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    normalisers: Tensor,
    divergence: Divergence,
    teacher_is_difference: bool = False,
) -> Tensor:
    """Step 2: [N, 2] float64, these columns' share of the divergence and of sum Q h, which the gradient
    needs, in nats; both add up over shards. normalisers: [N, 2] float64, of the whole rows. The second is 0
    for forward_kl, which needs none."""
    pairs = RowPairs.of(
        student, teacher, student_rows, teacher_rows, teacher_is_difference=teacher_is_difference
    )
    task = pairs.task(divergence)
    normalisers, sums = normalisers.to(torch.float64).contiguous(), _pair_of_doubles(pairs)
    task.normalisers, task.sums = normalisers.data_ptr(), sums.data_ptr()
    _run_step("jsd_sums", pairs, task)
    return sums


def jsd_gradient(  # noqa: PLR0913
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    normalisers: Tensor,
    sums: Tensor,
    divergence: Divergence,
    gradient_dtype: torch.dtype | None = None,
    scales: Tensor | None = None,
    in_place: bool = False,
    teacher_is_difference: bool = False,
) -> Tensor:
    """Step 3: the gradient [N, V] of these columns, as native_divergence gives it. normalisers, sums:
    [N, 2] float64, of whole rows."""
    pairs = RowPairs.of(
        student, teacher, student_rows, teacher_rows, teacher_is_difference=teacher_is_difference
    )
    task = pairs.task(divergence)
    normalisers, sums = normalisers.to(torch.float64).contiguous(), sums.to(torch.float64).contiguous()
    task.normalisers, task.sums = normalisers.data_ptr(), sums.data_ptr()
    gradient = _gradient(
        pairs, task, with_gradient=True, dtype=gradient_dtype, in_place=student if in_place else None
    )
    scales = _set_scales(task, scales)
    _run_step("jsd_gradient", pairs, task)
    return gradient


def scatter_rows(
    gradient: Tensor, rows: Tensor, scales: Tensor, *, num_rows: int, instruction_set: str | None = None
) -> Tensor:
    """[num_rows, V], row r = sum over i with rows[i] == r of scales[i] * gradient[i], summed in float32 in
    list order, in gradient's dtype.

    gradient: [N, V] float32 or bfloat16. rows: [N] integer. scales: [N].
    """
    backend = _backend(gradient.device)
    gradient, rows = rows_in_memory(gradient), rows.to(torch.int64).contiguous()
    scales = scales.to(torch.float32).contiguous()
    out = torch.empty(num_rows, gradient.shape[1], dtype=gradient.dtype, device=gradient.device)
    listed, starts = backend.listed(rows, num_rows)
    task = ScatterTask(
        gradient=matrix(gradient),
        out=matrix(out),
        rows=listed.data_ptr(),
        starts=None if starts is None else starts.data_ptr(),
        scales=scales.data_ptr(),
        vocabulary=gradient.shape[1],
    )
    if out.numel():
        backend.run("scatter_rows", task, device=gradient.device, instruction_set=instruction_set)
    return out


def _backend(device: torch.device) -> ModuleType:
    return cuda_library if device.type == "cuda" else cpu_library


def _pair_of_doubles(pairs: RowPairs) -> Tensor:
    return torch.empty(pairs.num_rows, 2, dtype=torch.float64, device=pairs.student.device)


def _gradient(
    pairs: RowPairs,
    task: RowsTask,
    *,
    with_gradient: bool,
    dtype: torch.dtype | None,
    in_place: Tensor | None,
) -> Tensor:
    """Where the gradients go, `in_place` or a new matrix; the task is told."""
    if in_place is not None:
        if not with_gradient or dtype not in (None, in_place.dtype):
            found = f"gradient_dtype={dtype}, with_gradient={with_gradient}"
            raise ValueError(f"in_place with {found}: expected a gradient, in the logits' {in_place.dtype}")
        if in_place.stride(1) != 1:
            raise ValueError(f"in_place on logits of strides {in_place.stride()}, expected adjacent columns")
        gradient, task.gradient_rows = in_place, task.student_rows
    else:
        num_rows = pairs.num_rows if with_gradient else 0
        gradient = torch.empty(
            num_rows, pairs.vocabulary, dtype=dtype or pairs.student.dtype, device=pairs.student.device
        )
    task.gradient = matrix(gradient) if with_gradient else Matrix(None, 0, 0, ELEMENT_TYPES[gradient.dtype])
    return gradient


def _set_scales(task: RowsTask, scales: Tensor | None) -> Tensor | None:
    """Float32 as the task sees them; the caller keeps them alive."""
    if scales is None:
        return None
    scales = scales.detach().to(torch.float32).contiguous()
    task.scales = scales.data_ptr()
    return scales


def _run_step(call: str, pairs: RowPairs, task: RowsTask) -> None:
    backend = _backend(pairs.student.device)
    scratch = backend.scratch(pairs, task, keeps_scores=False)
    task.scratch = None if scratch is None else scratch.data_ptr()
    if pairs.num_rows:
        backend.run(call, task, device=pairs.student.device, instruction_set=None)
