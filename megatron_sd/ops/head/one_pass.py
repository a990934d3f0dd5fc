"""The head and all that the losses need of it, in one pass: log-probabilities, entropies, divergences, and
their gradients.

A chunk of rows goes through the head, and the caller's loss of just these rows says at once how much each
of them counts. So the gradients of the hidden rows and of the head are taken while the chunk's logits
exist, and the logits make room for their own gradient: one product for the logits, one for the teacher's,
one for the rows' gradient, one for the head's, none twice. [rows, vocabulary] matrices exist a chunk at a
time in the dtype of the product. Native code visits them where they lie (native_block.py); where torch does
(torch_block.py), a block of a few rows at a time exists in float32 too.

How a loss in bfloat16 keeps its gradient where teacher and student are close: kernels/linear_jsd.md.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sd.ops.head.native_block import native_obstacle, visit_native_block
from megatron_sd.ops.head.products import add_outer_product, head_logits
from megatron_sd.ops.head.row_cuts import Cut, cut_rows
from megatron_sd.ops.head.sharded_block import visit_sharded_block
from megatron_sd.ops.head.torch_block import visit_torch_block
from megatron_sd.ops.head.types import HeadBlock, HeadOptions, HeadRows, RowLoss, RowValues, Visit
from megatron_sd.ops.native import cpu_library
from megatron_sd.ops.row_softmax import working_dtype

_LOG = logging.getLogger(__name__)

# Logits that torch works on at one time, in float32: on a CPU what stays in its caches, on a GPU what keeps it
# busy.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


def linear_jsd(  # noqa: PLR0913 (the rows, the head, and what is asked of them)
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: tuple[Tensor, Tensor | None],
    rows: HeadRows,
    *,
    row_loss: RowLoss | None,
    options: HeadOptions,
    teacher_head: tuple[Tensor, Tensor | None] | None = None,
) -> RowValues:
    """Log-probabilities of the rows' targets, divergences of student and teacher at the query rows, and the
    sum of their losses.

    hidden: [R, H] student states. teacher_hidden: [Q, H], taken without gradient. head: weight [V, H] and
    bias [V] or None, the student's and the teacher's, leaves or not (a head with LoRA is its merged
    weight). R or Q = 0: the loss stays connected. teacher_head: of a teacher with weights of its own, whose
    logits are then a product of their own; its states may have another width. With options.shard both heads
    are this rank's rows of it, as many on every rank, and all ranks call together. row_loss: called once for
    every block of rows, so it must be a sum over rows; None: values alone are wanted. The gradient is taken
    in the forward, of what requires one, so the backward needs neither weight nor logits and can run once.
    Raises ValueError for shapes that do not fit.
    """
    weight, bias = head
    _check(hidden, teacher_hidden, weight, weight if teacher_head is None else teacher_head[0], rows)
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    ):
        row_loss = None
    return RowValues(
        *_LinearJsd.apply(
            hidden, weight, bias, (teacher_hidden.detach(), teacher_head), rows, row_loss, options
        )
    )


class _LinearJsd(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (autograd hands everything on by position)
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, tuple[Tensor, Tensor | None] | None],
        rows: HeadRows,
        row_loss: RowLoss | None,
        options: HeadOptions,
    ) -> tuple[Tensor, ...]:
        inputs = _Inputs(hidden, *teacher, weight, bias, rows)
        chunks = cut_rows(len(hidden), rows.host_query_rows, options.chunk_rows)
        gradients = None
        if row_loss is not None:
            gradients = _Gradients(inputs, wanted=ctx.needs_input_grad[:3], is_sum=len(chunks) > 1)
        parts = [
            part for chunk in chunks for part in _visit_chunk(inputs, chunk, row_loss, gradients, options)
        ]
        ctx.gradients = gradients
        loss = torch.stack([part.loss for part in parts]).sum()
        columns = [
            part[0] if len(parts) == 1 else torch.cat(part)
            for part in zip(*(part[1:] for part in parts), strict=True)
        ]
        ctx.mark_non_differentiable(*columns, *([] if gradients else [loss]))
        return (loss, *columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_jsd keeps its gradients for one backward: expected no second one, or a second forward"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.times(grad_loss), None, None, None, None)


class _Inputs(NamedTuple):
    hidden: Tensor
    teacher_hidden: Tensor
    teacher_head: tuple[Tensor, Tensor | None] | None
    weight: Tensor
    bias: Tensor | None
    rows: HeadRows


class _Gradients:
    """Of the hidden rows, the weight and the bias, chunk by chunk; what is not wanted stays None.

    Sums over several chunks are float32; of one chunk the product itself, in the dtype of the weight, is
    enough.
    """

    def __init__(self, inputs: _Inputs, *, wanted: tuple[bool, ...], is_sum: bool):
        self._inputs = inputs
        self.hidden = torch.empty_like(inputs.hidden) if wanted[0] else None
        sum_dtype = working_dtype(inputs.weight.dtype) if is_sum else inputs.weight.dtype
        self.weight = torch.empty_like(inputs.weight, dtype=sum_dtype) if wanted[1] else None
        self.bias: Tensor | None = None
        if wanted[2] and inputs.bias is not None:
            self.bias = torch.zeros_like(inputs.bias, dtype=working_dtype(inputs.bias.dtype))

    def add(self, chunk: Cut, logits_gradient: Tensor) -> None:
        """logits_gradient: [C, V], of the chunk's rows."""
        hidden, weight = self._inputs.hidden[chunk.rows], self._inputs.weight
        if self.bias is not None:
            self.bias.add_(logits_gradient.sum(0, dtype=self.bias.dtype))
        logits_gradient = logits_gradient.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(logits_gradient, weight, out=self.hidden[chunk.rows])
        if self.weight is not None:
            add_outer_product(self.weight, logits_gradient, hidden, is_first=chunk.rows.start == 0)

    def times(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """The three, multiplied in their own memory, each in the dtype of what it is the gradient of."""
        pairs = (
            (self.hidden, self._inputs.hidden),
            (self.weight, self._inputs.weight),
            (self.bias, self._inputs.bias),
        )
        # The loss as it is has a factor of 1; on a GPU, to look would be to wait.
        is_one = factor.device.type == "cpu" and factor.item() == 1.0
        for gradient, _ in pairs:
            if gradient is not None and not is_one:
                gradient.mul_(factor)
        return tuple(
            None if gradient is None or of is None else gradient.to(of.dtype) for gradient, of in pairs
        )


def _visit_chunk(
    inputs: _Inputs, chunk: Cut, row_loss: RowLoss | None, gradients: _Gradients | None, options: HeadOptions
) -> list[RowValues]:
    """The values of each block of the chunk."""
    hidden, rows = inputs.hidden[chunk.rows], inputs.rows
    query_rows = rows.query_rows[chunk.queries] - chunk.rows.start
    # The chunk is as large as a matrix product needs to be fast; it stays in the product's dtype.
    logits = head_logits(
        hidden, inputs.weight, inputs.bias, unrounded=options.teacher_logits.startswith("float32")
    )
    # W h_t = W h_s + W (h_t - h_s): where both are close, a half-width product of the small difference
    # keeps the digits that two rounded products would cancel. Two heads have no common product.
    is_difference = inputs.teacher_head is None and options.teacher_logits.endswith("delta")
    own, read = hidden[query_rows], inputs.teacher_hidden[chunk.queries]
    teacher = _teacher_product(inputs, own, read, options, is_difference=is_difference)
    whole = HeadBlock(logits, teacher, rows.targets[chunk.rows], query_rows, is_difference)
    visit, block_rows = _visitor(whole, options)
    parts = []
    for cut in cut_rows(len(hidden), rows.host_query_rows[chunk.queries] - chunk.rows.start, block_rows):
        at = Cut(_shifted(cut.rows, chunk.rows), _shifted(cut.queries, chunk.queries))
        loss = None if row_loss is None else functools.partial(_loss_at, row_loss, at)
        parts.append(visit(whole.part(*cut), loss, options))
    if gradients is not None:
        gradients.add(chunk, logits)  # every block has put its gradient in the place of its logits
    return parts


def _visitor(chunk: HeadBlock, options: HeadOptions) -> tuple[Visit, int]:
    """Who visits the rows of a chunk, and how many of them at one time."""
    obstacle, logits = native_obstacle(chunk, options), chunk.logits
    _say_once("native code" if not obstacle else "torch", obstacle or cpu_library.INSTRUCTION_SET)
    if not obstacle:
        return visit_native_block, max(len(logits), 1)
    # A block is a few of the chunk's rows in float32: the only float32 logits that exist.
    elements = BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS["cuda"])
    visit = visit_torch_block if options.shard is None else visit_sharded_block
    return visit, max(elements // logits.shape[1], 1)


@functools.cache
def _say_once(chosen: str, reason: str) -> None:
    _LOG.info("the head's rows go through %s (%s)", chosen, reason)


def _loss_at(row_loss: RowLoss, at: Cut, values: RowValues) -> Tensor:
    return row_loss(values, at.rows, at.queries)


def _teacher_product(
    inputs: _Inputs, hidden: Tensor, teacher_hidden: Tensor, options: HeadOptions, *, is_difference: bool
) -> Tensor:
    """[q, V]: the teacher's logits, or what they have more than the student's at the same rows."""
    if is_difference:
        return head_logits(teacher_hidden - hidden, inputs.weight, None, unrounded=False)
    weight, bias = inputs.teacher_head or (inputs.weight, inputs.bias)
    return head_logits(teacher_hidden, weight, bias, unrounded=options.teacher_logits.startswith("float32"))


def _shifted(part: slice, whole: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


def _check(
    hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, teacher_weight: Tensor, rows: HeadRows
) -> None:
    pairs = ((hidden, weight), (teacher_hidden, teacher_weight))
    fits = all(states.shape[-1] == head.shape[-1] for states, head in pairs)
    fits &= len(weight) == len(teacher_weight)
    if not fits or len(hidden) != len(rows.targets) or len(teacher_hidden) != len(rows.query_rows):
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} for {len(rows.targets)} targets, teacher_hidden"
            f" {tuple(teacher_hidden.shape)} for {len(rows.query_rows)} query rows, the head's weight"
            f" {tuple(weight.shape)} and the teacher's {tuple(teacher_weight.shape)}: expected [R, H],"
            " [Q, H'], [V, H] and [V, H'] (H' is H under one head)"
        )
