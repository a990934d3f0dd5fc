"""Other ways from hidden states to the losses than ops/head/one_pass.py: whole logits; chunks that the
backward recomputes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd import jsd_rows


def whole_logits(
    hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, targets: Tensor, query_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(logprobs [R], JSD [Q]) as usually written: [R, V] logits in float32, TRL's generalised JSD at beta
    0.5."""
    log_q = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    with torch.no_grad():
        log_p = torch.log_softmax(F.linear(teacher_hidden, weight).float(), -1)
    own = log_q[query_rows]
    mixture = torch.logsumexp(torch.stack([own + math.log(0.5), log_p + math.log(0.5)]), 0)
    to_teacher, to_student = (
        F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (log_p, own)
    )
    return log_q.gather(-1, targets[:, None])[:, 0], 0.5 * (to_teacher + to_student)


def checkpointed(  # noqa: PLR0913, PLR0917 (as whole_logits, and the chunk)
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    query_rows: Tensor,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of rows, each recomputed in the backward (when there is more than one): this
    library's former head."""
    parts = []
    for start in range(0, len(hidden), chunk_rows):
        first, last = torch.searchsorted(query_rows, torch.tensor([start, start + chunk_rows])).tolist()
        rows = slice(start, start + chunk_rows)
        arguments = (
            hidden[rows],
            teacher_hidden[first:last],
            weight,
            targets[rows],
            query_rows[first:last] - start,
        )
        if len(hidden) > chunk_rows:
            parts.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(*arguments))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _chunk(
    hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, targets: Tensor, query_rows: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).float()
    logprobs = _TargetLogprobs.apply(logits / 1.0, targets)[0]
    with torch.no_grad():
        teacher = logits[query_rows] + F.linear(teacher_hidden - hidden[query_rows], weight).float()
        _entropy(teacher)
    every = torch.arange(len(query_rows))
    ones = torch.ones(len(query_rows))
    divergence = Divergence(kind="jsd", beta=0.5, temperature=1.0)
    return logprobs, jsd_rows(logits, teacher, query_rows, every, ones, divergence=divergence).values


def _entropy(logits: Tensor) -> Tensor:
    log_normaliser = torch.logsumexp(logits, -1, keepdim=True)
    return log_normaliser.squeeze(-1) - torch.exp(logits - log_normaliser).mul_(logits).sum(-1)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_normaliser = torch.logsumexp(logits, -1, keepdim=True)
        probabilities = torch.exp(logits - log_normaliser)
        entropies = log_normaliser.squeeze(-1) - logits.clamp(min=-1e30).mul_(probabilities).sum(-1)
        ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(probabilities, targets)
        return (logits.gather(-1, targets[:, None]) - log_normaliser).squeeze(-1), entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, _grad_entropies: Tensor):
        probabilities, targets = ctx.saved_tensors
        gradient = probabilities * -grad_logprobs[:, None]
        return gradient.scatter_add_(-1, targets[:, None], grad_logprobs[:, None]), None
