"""From hidden states to what the losses need of the vocabulary, in chunks: [rows, vocabulary] logits never exist as a whole.

A chunk of rows goes through the head, gives its log-probabilities, entropies and divergences, and is forgotten; the backward
recomputes it. When everything fits one chunk nothing is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import MASKED


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """sampling_temperature: of the rollouts; log-probabilities and entropies are of softmax(logits / it). The rest: of the
    divergence (ops/jsd.py). chunk_rows: student rows per chunk; the teacher's rows at their query positions come on top."""

    sampling_temperature: float
    divergence: str
    beta: float
    temperature: float
    top_k: int | None
    chunk_rows: int


class Chunk(NamedTuple):
    """Rows [start, stop) and the query rows [query_start, query_stop) that lie among them."""

    start: int
    stop: int
    query_start: int
    query_stop: int


class HeadRows(NamedTuple):
    """targets: [R] int64, the token each row predicts. query_rows: [Q] int64, increasing: the rows that the teacher's rows match.
    chunks: plan_chunks of both."""

    targets: Tensor
    query_rows: Tensor
    chunks: list[Chunk]

    def without_teacher(self) -> HeadRows:
        """The same rows, none of them a query row."""
        chunks = [chunk._replace(query_start=0, query_stop=0) for chunk in self.chunks]
        return HeadRows(self.targets, self.query_rows[:0], chunks)


class RowValues(NamedTuple):
    """logprobs [R] (gradient), entropies [R]; at the query rows: divergences [Q] (gradient), teacher_entropies [Q],
    truncated_masses [Q]. All float32, nats."""

    logprobs: Tensor
    entropies: Tensor
    divergences: Tensor
    teacher_entropies: Tensor
    truncated_masses: Tensor


def plan_chunks(num_rows: int, query_rows: np.ndarray, chunk_rows: int) -> list[Chunk]:
    """Cut num_rows rows into chunks; query_rows [Q] are increasing row numbers. At least one chunk, possibly empty.

    >>> plan_chunks(5, np.array([1, 3, 4]), 3)
    [Chunk(start=0, stop=3, query_start=0, query_stop=1), Chunk(start=3, stop=5, query_start=1, query_stop=3)]
    """
    starts = range(0, max(num_rows, 1), chunk_rows)
    bounds = [(start, min(start + chunk_rows, num_rows)) for start in starts]
    return [Chunk(a, b, int(np.searchsorted(query_rows, a)), int(np.searchsorted(query_rows, b))) for a, b in bounds]


def row_values(
    hidden: Tensor, teacher_hidden: Tensor, head: tuple[Tensor, Tensor | None], rows: HeadRows, *, options: HeadOptions
) -> RowValues:
    """Log-probabilities of the rows' targets, and divergences of student and teacher at the query rows.

    hidden: [R, H] student states. teacher_hidden: [Q, H], taken without gradient. head: weight [V, H] and bias [V] or None,
    shared by student and teacher.
    """
    weight, bias = head
    recompute = len(rows.chunks) > 1 and torch.is_grad_enabled()
    parts = []
    for start, stop, query_start, query_stop in rows.chunks:
        arguments = (
            hidden[start:stop],
            teacher_hidden[query_start:query_stop].detach(),
            weight,
            bias,
            rows.targets[start:stop],
            rows.query_rows[query_start:query_stop] - start,
            options,
        )
        if recompute:
            parts.append(checkpoint(_chunk_values, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk_values(*arguments))
    return parts[0] if len(parts) == 1 else RowValues(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk_values(  # noqa: PLR0913, PLR0917 (torch's checkpoint wants its tensors as plain arguments)
    hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    query_rows: Tensor,
    options: HeadOptions,
) -> RowValues:
    logits = F.linear(hidden, weight, bias).float()
    logprobs, entropies = _TargetLogprobs.apply(logits / options.sampling_temperature, targets)
    if len(query_rows) == 0:  # divergences stay in the graph: the backward must look alike on every rank
        return RowValues(logprobs, entropies, logprobs[:0], entropies[:0], entropies[:0])
    with torch.no_grad():
        teacher_logits = shifted_logits(logits[query_rows], teacher_hidden - hidden[query_rows], weight)
        teacher_entropies = _entropy(teacher_logits / options.sampling_temperature)
    divergences, truncated_masses = jsd_rows(
        logits,
        teacher_logits,
        query_rows,
        torch.arange(len(query_rows), device=query_rows.device),
        torch.ones_like(teacher_entropies),
        divergence=options.divergence,
        beta=options.beta,
        temperature=options.temperature,
        top_k=options.top_k,
    )
    return RowValues(logprobs, entropies, divergences, teacher_entropies, truncated_masses)


def shifted_logits(logits: Tensor, hidden_difference: Tensor, weight: Tensor) -> Tensor:
    """logits + hidden_difference @ weight.T: the teacher's logits from the student's, in float32.

    Both share the head, so only the difference of their hidden states goes through it. In bfloat16 the divergence of two rows
    that are nearly equal would otherwise be rounding noise; and equal hidden states give equal logits, bit for bit.
    """
    return logits + F.linear(hidden_difference, weight).float()


def _entropy(logits: Tensor) -> Tensor:
    """[N] entropies of softmax(logits) for float32 [N, V] logits, in nats."""
    log_normaliser = torch.logsumexp(logits, -1, keepdim=True)
    return log_normaliser.squeeze(-1) - torch.exp(logits - log_normaliser).mul_(logits.clamp(min=MASKED)).sum(-1)


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(logits)[target] with its gradient onehot - softmax, and the entropy, from one exponential."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_normaliser = torch.logsumexp(logits, -1, keepdim=True)
        probabilities = torch.exp(logits - log_normaliser)
        entropies = log_normaliser.squeeze(-1) - logits.clamp(min=MASKED).mul_(probabilities).sum(-1)
        logprobs = (logits.gather(-1, targets[:, None]) - log_normaliser).squeeze(-1)
        ctx.mark_non_differentiable(entropies)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(probabilities, targets)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor, _grad_entropies: Tensor):
        probabilities, targets = ctx.saved_tensors
        gradient = probabilities * -grad_logprobs[:, None]
        return gradient.scatter_add_(-1, targets[:, None], grad_logprobs[:, None]), None
