"""A block of rows in the head's pass where each rank has some columns of the vocabulary (one_pass.py: where
it has all)."""

from __future__ import annotations

import torch

from megatron_sd.ops.divergence import SAMPLED
from megatron_sd.ops.head.sampled import sampled_divergence
from megatron_sd.ops.head.targets import target_logits
from megatron_sd.ops.head.types import BlockLoss, HeadBlock, HeadOptions, RowValues
from megatron_sd.ops.head.vocab_parallel import vocab_parallel_divergence, vocab_parallel_logprobs
from megatron_sd.ops.row_softmax import working_dtype


def visit_sharded_block(block: HeadBlock, row_loss: BlockLoss | None, options: HeadOptions) -> RowValues:
    """Values of a block of this rank's columns, the same on every rank. With a row_loss, the gradient of the
    loss takes the place of its logits."""
    logits, teacher, targets, query_rows, teacher_is_difference = block
    wants_gradient, shard = row_loss is not None, options.shard
    if shard is None:
        raise ValueError("options.shard is None, expected this rank's part of a sharded vocabulary")
    scaled = logits.to(working_dtype(logits.dtype)).detach().requires_grad_(wants_gradient)
    with torch.set_grad_enabled(wants_gradient):
        student = scaled[query_rows]
        teacher = target_logits(teacher, student, options.target, is_difference=teacher_is_difference)
        logprobs, entropies = vocab_parallel_logprobs(
            scaled, targets, shard, temperature=options.sampling_temperature
        )
        teacher_logprobs, teacher_entropies = vocab_parallel_logprobs(
            teacher.detach(), targets[query_rows], shard, temperature=options.sampling_temperature
        )
        if options.divergence.kind == SAMPLED:
            divergences = sampled_divergence(logprobs[query_rows], teacher_logprobs)
        else:
            divergences = vocab_parallel_divergence(student, teacher, shard, options.divergence)
    of_teacher = (teacher_entropies, teacher_logprobs, torch.zeros_like(teacher_entropies))
    values = RowValues(logprobs.new_zeros(()), logprobs, entropies, divergences, *of_teacher)
    if row_loss is None:
        return values
    with torch.enable_grad():
        loss = row_loss(values)
        (gradient,) = torch.autograd.grad(loss, scaled, materialize_grads=True)
    logits.copy_(gradient)
    return values.detached(loss)
