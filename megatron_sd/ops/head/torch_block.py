"""A block of rows in the head's pass by torch alone: any device, dtype, divergence and target. Slow, and what
the native visits (native_block.py) are judged against."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from megatron_sd.ops.divergence import SAMPLED
from megatron_sd.ops.head.sampled import sampled_divergence
from megatron_sd.ops.head.targets import target_logits
from megatron_sd.ops.head.types import BlockLoss, HeadBlock, HeadOptions, RowValues
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.row_softmax import RowSoftmax, working_dtype


def visit_torch_block(block: HeadBlock, row_loss: BlockLoss | None, options: HeadOptions) -> RowValues:
    """Values of a block. With a row_loss, the gradient of the loss takes the place of its logits."""
    logits, teacher, targets, query_rows, teacher_is_difference = block
    wants_gradient = row_loss is not None
    scaled = logits.to(working_dtype(logits.dtype))  # itself, when it has that dtype
    # Three leaves, so that autograd stops here: `student`, the query rows' logits, takes the divergence's
    # gradient, `logprobs` and `entropies` the policy's. All go into the logits' gradient by hand, below; no
    # [rows, V] graph is kept.
    student = scaled[query_rows].requires_grad_(wants_gradient)
    teacher = target_logits(teacher, student, options.target, is_difference=teacher_is_difference)
    with torch.set_grad_enabled(wants_gradient):
        divergences, truncated_masses = _divergences(student, teacher, options)
    read = RowSoftmax.of(teacher, options.sampling_temperature, targets[query_rows])

    softmax = RowSoftmax.of(scaled, options.sampling_temperature, targets)
    logprobs = cast(Tensor, softmax.logprobs).requires_grad_(wants_gradient)
    entropies = softmax.entropies.requires_grad_(wants_gradient)
    teacher_logprobs = cast(Tensor, read.logprobs)
    if options.divergence.kind == SAMPLED:
        with torch.set_grad_enabled(wants_gradient):
            divergences = sampled_divergence(logprobs[query_rows], teacher_logprobs)
    values = RowValues(
        logprobs.new_zeros(()),
        logprobs,
        entropies,
        divergences,
        read.entropies,
        teacher_logprobs,
        truncated_masses,
    )
    if row_loss is None:
        return values
    with torch.enable_grad():
        loss = row_loss(values)
        # None: without a policy term, a query row or an entropy bonus, one of them has no part in the loss
        slopes, student_gradient, entropy_slopes = torch.autograd.grad(
            loss, (logprobs, student, entropies), allow_unused=True
        )
    slopes = torch.zeros_like(logprobs) if slopes is None else slopes
    gradient = softmax.gradient(slopes, targets, options.sampling_temperature, entropy_slopes=entropy_slopes)
    if student_gradient is not None:
        gradient.index_add_(0, query_rows, student_gradient)
    logits.copy_(gradient)
    return values.detached(loss)


def _divergences(student: Tensor, teacher: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """[q] divergences and truncated masses of two [q, V] matrices, row by row; 0 where only the sampled token
    is looked at."""
    if len(student) == 0 or options.divergence.kind == SAMPLED:
        return student.sum(-1), student.new_zeros(len(student))
    every = torch.arange(len(student), device=student.device)
    return jsd_rows(
        student,
        teacher,
        every,
        every,
        student.new_ones(len(student)),
        divergence=options.divergence,
    )
