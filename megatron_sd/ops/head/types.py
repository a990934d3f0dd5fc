"""What goes into the head's one pass, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.vocab_parallel import VocabShard

TEACHER_LOGITS = ("delta", "float32_delta", "float32", "same_dtype")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """sampling_temperature: of the rollouts; log-probabilities and entropies are of softmax(logits / it).

    divergence: of student and teacher at the query rows. teacher_logits: "delta": the student's, plus the
    head's product with the difference of hidden states, each rounded to the model's dtype; "float32_delta":
    the same with unrounded (float32) logits of the student; "float32": two unrounded products;
    "same_dtype": two rounded ones, which is wrong in bfloat16 when both are close. chunk_rows: student rows
    per chunk; the teacher's rows at their query positions come on top. target: what is made of the
    teacher's logits (targets.py). shard: this rank's part of a sharded vocabulary; None: it is whole.
    """

    sampling_temperature: float
    divergence: Divergence
    teacher_logits: str
    chunk_rows: int
    target: str
    shard: VocabShard | None = None


class HeadRows(NamedTuple):
    """targets: [R] int64, the token each row predicts. query_rows: [Q] int64, increasing: the rows that the
    teacher's rows match. host_query_rows: the same as a numpy array, so that cutting rows into chunks asks
    nothing of the device."""

    targets: Tensor
    query_rows: Tensor
    host_query_rows: np.ndarray

    def without_teacher(self) -> HeadRows:
        """The same rows, none of them a query row."""
        return HeadRows(self.targets, self.query_rows[:0], self.host_query_rows[:0])


class RowValues(NamedTuple):
    """loss: the scalar sum of the row losses, which alone has a gradient; 0 without a row loss. logprobs,
    entropies: [R]; at the query rows: divergences, teacher_entropies, teacher_logprobs of the rows' targets,
    truncated_masses, all [Q]. All float32, nats.

    In a row loss's argument, logprobs, entropies and divergences have a gradient and `loss` is nothing yet.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor
    divergences: Tensor
    teacher_entropies: Tensor
    teacher_logprobs: Tensor
    truncated_masses: Tensor

    def detached(self, loss: Tensor) -> RowValues:
        """The values without their gradients, and what the row losses came to."""
        return RowValues(loss.detach(), *(column.detach() for column in self[1:]))


class HeadBlock(NamedTuple):
    """Some rows in the head's pass. logits: [N, V], of the student; a visit may put their gradient in their
    place. teacher: [Q, V], of the query rows: its logits, or with teacher_is_difference what they have more
    than the student's. With a sharded vocabulary V is this rank's columns. targets: [N], query_rows: [Q] int64,
    as in HeadRows."""

    logits: Tensor
    teacher: Tensor
    targets: Tensor
    query_rows: Tensor
    teacher_is_difference: bool

    def part(self, rows: slice, queries: slice) -> HeadBlock:
        """These of the rows, and of the query rows those that lie among them."""
        return HeadBlock(
            self.logits[rows],
            self.teacher[queries],
            self.targets[rows],
            self.query_rows[queries] - rows.start,
            self.teacher_is_difference,
        )


BlockLoss = Callable[[RowValues], Tensor]  # of a block's values: its rows' share of the loss, a scalar
# (block, its loss, what is wanted) -> its values; with a loss its gradient takes the place of the logits
Visit = Callable[[HeadBlock, BlockLoss | None, HeadOptions], RowValues]


# (values of some rows, which rows, which query rows) -> their share of the loss, a scalar.
RowLoss = Callable[[RowValues, slice, slice], Tensor]
