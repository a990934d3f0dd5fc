"""A block of rows in the head's pass by two native visits to its logits: no matrix beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_sd.ops.divergence import SAMPLED, Divergence
from megatron_sd.ops.head.sampled import sampled_divergence
from megatron_sd.ops.head.types import BlockLoss, HeadBlock, HeadOptions, RowValues
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.native import calls
from megatron_sd.ops.native.head_visits import HeadVisits
from megatron_sd.ops.native.torch_ops import warn_of_nan


def native_obstacle(block: HeadBlock, options: HeadOptions) -> str:
    """What keeps the native visits from this block, "" if nothing does. The same with and without query rows,
    so that the policy's bits do not depend on the teacher."""
    if options.shard is not None:
        return "a sharded vocabulary"
    if options.target != "teacher":
        return f"target={options.target!r}"
    if block.logits.device.type != "cpu":
        return f"tensors on {block.logits.device}"
    # The divergence of the likeliest tokens, or of the sampled one, is of few numbers a row.
    is_of_few = options.divergence.kind == SAMPLED or options.divergence.top_k is not None
    return calls.obstacle(
        block.logits,
        block.teacher,
        None if is_of_few else options.divergence,
        teacher_is_difference=block.teacher_is_difference,
    )


def visit_native_block(block: HeadBlock, row_loss: BlockLoss | None, options: HeadOptions) -> RowValues:
    """Values of a block. With a row_loss, the gradient of the loss takes the place of its logits."""
    visits = HeadVisits(
        block.logits,
        block.teacher,
        block.targets,
        block.query_rows,
        divergence=None if options.divergence.kind == SAMPLED else options.divergence,
        temperature=options.sampling_temperature,
        teacher_is_difference=block.teacher_is_difference,
    )
    numbers, wants_gradient = visits.numbers, row_loss is not None
    # of what the divergences are made: the second visit takes them further, to the logits
    of_divergences = numbers.divergences if visits.likeliest is None else visits.likeliest.student
    leaves = numbers.logprobs, numbers.entropies, of_divergences
    for leaf in leaves:
        leaf.requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        divergences, truncated_masses = _divergences(visits, block.query_rows, options.divergence)
    values = RowValues(
        numbers.logprobs.new_zeros(()),
        numbers.logprobs,
        numbers.entropies,
        divergences,
        numbers.teacher_entropies,
        numbers.teacher_logprobs,
        truncated_masses,
    )
    if row_loss is None:
        return values
    with torch.enable_grad():
        loss = row_loss(values)
        # None: without a policy term, an entropy bonus or a query row, one of them has no part in the loss
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    visits.write_gradient(*slopes)
    return values.detached(loss)


def _divergences(visits: HeadVisits, query_rows: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """[q] divergences, differentiable in what the second visit takes slopes of, and [q] truncated masses."""
    numbers, likeliest = visits.numbers, visits.likeliest
    every, nothing = torch.arange(len(query_rows)), torch.zeros_like(numbers.teacher_logprobs)
    if divergence.kind == SAMPLED:
        return sampled_divergence(numbers.logprobs[query_rows], numbers.teacher_logprobs), nothing
    if likeliest is None:
        warn_of_nan(numbers.divergences, query_rows, every)
        return numbers.divergences * divergence.scale, nothing
    # Rows of a few tokens each; renormalised, they are a whole vocabulary.
    of_all = replace(divergence, top_k=None, support="teacher", tail_bucket=False)
    values, _ = jsd_rows(
        likeliest.student, likeliest.teacher, every, every, torch.ones_like(nothing), divergence=of_all
    )
    return values, likeliest.truncated_masses
