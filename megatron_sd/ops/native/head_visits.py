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
        ("support", ctypes.c_void_p),
        ("student_events", ctypes.c_void_p),
        ("teacher_events", ctypes.c_void_p),
        ("event_slopes", ctypes.c_void_p),
        ("outside", ctypes.c_void_p),
        ("truncated_masses", ctypes.c_void_p),
        ("num_kept", ctypes.c_int64),
        ("support_of_student", ctypes.c_int32),
        ("has_tail", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


class HeadNumbers(NamedTuple):
    """logprobs of the targets and entropies, [R]; at the query rows teacher_logprobs of the same targets,
    teacher_entropies, and divergences (0 where none was asked for, or a top_k), [Q]. All float32, nats."""

    logprobs: Tensor
    entropies: Tensor
    teacher_logprobs: Tensor
    teacher_entropies: Tensor
    divergences: Tensor


class LikeliestTokens(NamedTuple):
    """The top_k likeliest tokens of each query row, of equal ones the first: support [Q, k] int64, increasing;
    student, teacher: their logits [Q, k], or with a tail bucket [Q, k + 1], all other tokens as the last;
    truncated_masses [Q]: the student's probability of all others at the divergence's temperature. float32; a
    row that the divergence is to be NaN of is NaN in `student`."""

    support: Tensor
    student: Tensor
    teacher: Tensor
    truncated_masses: Tensor

    @classmethod
    def room(cls, num_queries: int, divergence: Divergence, vocabulary: int) -> LikeliestTokens:
        """For the library to fill. Raises ConfigError for a top_k above the vocabulary."""
        divergence.check_vocabulary(vocabulary)
        kept = divergence.top_k or 0
        events = kept + (divergence.tail_bucket and kept < vocabulary)
        return cls(
            support=torch.zeros(num_queries, kept, dtype=torch.int64),
            student=torch.zeros(num_queries, events, dtype=torch.float32),
            teacher=torch.zeros(num_queries, events, dtype=torch.float32),
            truncated_masses=torch.zeros(num_queries, dtype=torch.float32),
        )


class HeadVisits:
    """The first visit, with what it found in `numbers` and, with a top_k, in `likeliest` (else None), of which
    the caller makes the divergence; write_gradient is the second.

    logits [R, V] and the teacher's matrix [Q, V]: float32 or bfloat16 on the CPU, adjacent columns. targets
    [R], query_rows [Q]: integers, each row at most once. divergence: of the query rows; None: none.
    temperature: of log-probabilities and entropies. teacher_is_difference: the teacher's matrix holds its
    logits minus the student's. The library must be there (cpu_library.LIBRARY).

    A row's bits depend neither on threads nor on other rows. A row with a NaN or +inf, or of nothing but
    -inf, is NaN. Raises ValueError for shapes that do not fit, targets and row numbers out of range, columns
    of the logits that are not adjacent, and a divergence of all tokens that the library has not, and
    ConfigError for a top_k above V.
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
        if len(targets) != len(logits) or teacher.shape != (len(query_rows), logits.shape[1]):
            raise ValueError(
                f"{len(targets)} targets and {len(query_rows)} query rows for logits of {tuple(logits.shape)} and"
                f" the teacher's {tuple(teacher.shape)}, expected [R], [Q], [R, V] and [Q, V]"
            )
        targets, query_rows = targets.to(torch.int64), query_rows.to(torch.int64)
        check_rows("targets", targets, logits.shape[1])
        check_rows("query_rows", query_rows, len(logits))
        num_rows, num_queries = len(logits), len(query_rows)
        self._instruction_set = instruction_set
        self.numbers = HeadNumbers(
            *(torch.zeros(size, dtype=torch.float32) for size in (num_rows, num_rows, *[num_queries] * 3))
        )
        self.likeliest: LikeliestTokens | None = None
        if divergence is not None and divergence.top_k is not None:
            self.likeliest = LikeliestTokens.room(num_queries, divergence, logits.shape[1])
        # What the task points to lives as long as this object.
        every = torch.arange(num_queries)
        self._pairs = RowPairs.of(
            logits, teacher, query_rows, every, teacher_is_difference=teacher_is_difference
        )
        self._targets = targets.contiguous()
        self._queries = torch.full((num_rows,), -1).index_copy_(0, query_rows, every)
        self._normalisers, self._outside, self._pair_normalisers, self._sums = (
            torch.empty(size, dtype=torch.float64)
            for size in (num_rows, num_queries, 2 * num_queries, 2 * num_queries)
        )
        self._task = self._make_task(divergence, temperature)
        self._run("head_values")

    def write_gradient(
        self, slopes: Tensor | None, entropy_slopes: Tensor | None, divergence_slopes: Tensor | None
    ) -> Tensor:
        """The gradient of sum(slopes * logprobs) + sum(entropy_slopes * entropies) + sum(divergence_slopes *
        divergences), in the place of the logits. Slopes: [R], [R] and [Q], or with a top_k those of
        likeliest.student in its shape; None: has no part in the sum, not even as a NaN. Once."""
        columns = [
            None if column is None else column.detach().to(torch.float32).contiguous()
            for column in (slopes, entropy_slopes, divergence_slopes)
        ]
        task = self._task
        task.slopes, task.entropy_slopes, third = (
            None if column is None else column.data_ptr() for column in columns
        )
        if self.likeliest is None:
            task.pairs.scales = third
        else:
            task.event_slopes = third
        self._run("head_gradient")
        return self._pairs.student

    def _make_task(self, divergence: Divergence | None, temperature: float) -> HeadTask:
        numbers, likeliest = self.numbers, self.likeliest
        pairs = self._pairs.task(divergence if likeliest is None else None)
        pairs.values, pairs.normalisers, pairs.sums = (
            column.data_ptr() for column in (numbers.divergences, self._pair_normalisers, self._sums)
        )
        task = HeadTask(
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
        if divergence is not None and likeliest is not None:
            task.pairs.temperature = divergence.temperature
            task.support, task.student_events, task.teacher_events, task.truncated_masses = (
                tensor.data_ptr() for tensor in likeliest
            )
            task.outside = self._outside.data_ptr()
            task.num_kept = likeliest.support.shape[1]
            task.has_tail = likeliest.student.shape[1] - likeliest.support.shape[1]
            task.support_of_student = divergence.support == "student"
        return task

    def _run(self, call: str) -> None:
        device = self._pairs.student.device
        cpu_library.run(call, self._task, device=device, instruction_set=self._instruction_set)
