"""The head's two visits to rows of logits on CPUs, natively: what a loss needs of them, and its gradient in
their place. Without autograd; between the two the caller asks the loss for its slopes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.native import cpu_library
from megatron_sd.ops.native.structs import RowPairs, RowsTask
from megatron_sd.ops.native.torch_ops import check_rows


class HeadTask(ctypes.Structure):
    """kernels/csrc/head_task.h."""

    _fields_ = [
        ("pairs", RowsTask),
        ("targets", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("normalisers", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("entropies", ctypes.c_void_p),
        ("teacher_logprobs", ctypes.c_void_p),
        ("teacher_entropies", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("entropy_slopes", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


class HeadNumbers(NamedTuple):
    """logprobs of the targets and entropies, [R]; at the query rows teacher_logprobs of the same targets,
    teacher_entropies, and divergences (0 where none was asked for), [Q]. All float32, nats."""

    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    teacher_entropies: Tensor
    divergences: Tensor


class HeadVisits:
    """The first visit, with what it found in `numbers`; write_gradient is the second.

    logits [R, V] and the teacher's matrix [Q, V]: float32 or bfloat16 on the CPU, adjacent columns. targets
    [R], query_rows [Q]: int64. divergence: of the query rows; None: none. temperature: of log-probabilities
    and entropies. teacher_is_difference: the teacher's matrix holds its logits minus the student's. The
    library must be there (cpu_library.LIBRARY).

    A row's bits depend neither on threads nor on other rows. A row with a NaN or +inf, or of nothing but
    -inf, is NaN. Raises ValueError for targets and row numbers out of range, for columns of the logits that
    are not adjacent, and for a divergence that the library has not.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher: Tensor,
        targets: Tensor,
        query_rows: Tensor,
        *,
        divergence: Divergence | None,
        temperature: float,
        teacher_is_difference: bool,
        instruction_set: str | None = None,
    ):
        if logits.stride(1) != 1:
            raise ValueError(f"logits of strides {logits.stride()}, expected adjacent columns")
        check_rows("targets", targets, logits.shape[1])
        check_rows("query_rows", query_rows, len(logits))
        num_rows, num_queries = len(logits), len(query_rows)
        self._instruction_set = instruction_set
        self.numbers = HeadNumbers(
            *(torch.zeros(size, dtype=torch.float32) for size in (num_rows, num_rows, *[num_queries] * 3))
        )
        # What the task points to lives as long as this object.
        every = torch.arange(num_queries)
        self._pairs = RowPairs.of(
            logits, teacher, query_rows, every, teacher_is_difference=teacher_is_difference
        )
        self._targets = targets.contiguous()
        self._queries = torch.full((num_rows,), -1).index_copy_(0, query_rows, every)
        self._normalisers, self._pair_normalisers, self._sums = (
            torch.empty(size, dtype=torch.float64) for size in (num_rows, 2 * num_queries, 2 * num_queries)
        )
        self._task = self._make_task(divergence, temperature)
        self._run("head_values")

    def write_gradient(
        self, slopes: Tensor | None, entropy_slopes: Tensor | None, divergence_slopes: Tensor | None
    ) -> Tensor:
        """The gradient of sum(slopes * logprobs) + sum(entropy_slopes * entropies) + sum(divergence_slopes *
        divergences), in the place of the logits. Slopes: [R], [R] and [Q]; None: has no part in the sum, not
        even as a NaN. Once."""
        columns = [
            None if column is None else column.detach().to(torch.float32).contiguous()
            for column in (slopes, entropy_slopes, divergence_slopes)
        ]
        self._task.slopes, self._task.entropy_slopes, self._task.pairs.scales = (
            None if column is None else column.data_ptr() for column in columns
        )
        self._run("head_gradient")
        return self._pairs.student

    def _make_task(self, divergence: Divergence | None, temperature: float) -> HeadTask:
        numbers, pairs = self.numbers, self._pairs.task(divergence)
        pairs.values, pairs.normalisers, pairs.sums = (
            column.data_ptr() for column in (numbers.divergences, self._pair_normalisers, self._sums)
        )
        return HeadTask(
            pairs=pairs,
            targets=self._targets.data_ptr(),
            queries=self._queries.data_ptr(),
            normalisers=self._normalisers.data_ptr(),
            logprobs=numbers.logprobs.data_ptr(),
            entropies=numbers.entropies.data_ptr(),
            teacher_logprobs=numbers.teacher_logprobs.data_ptr(),
            teacher_entropies=numbers.teacher_entropies.data_ptr(),
            num_rows=len(self._targets),
            temperature=temperature,
        )

    def _run(self, call: str) -> None:
        device = self._pairs.student.device
        cpu_library.run(call, self._task, device=device, instruction_set=self._instruction_set)
