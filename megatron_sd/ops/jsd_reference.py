"""The divergence of a teacher's and a student's token distributions, row by row: the oracle.

Plain torch, any floating dtype and device; tests judge every other implementation against this one, and this one against
float64 autograd of the textbook formula. With z = logits / temperature, P = softmax(teacher), Q = softmax(student):

    jsd(beta)    beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q,  0 < beta < 1
    forward_kl   KL(P || Q)
    reverse_kl   KL(Q || P)

The teacher gets no gradient. The student's gradient is computed in the forward, from closed forms:

    jsd          (1 - beta)/T * Q_j (r_j - sum_k Q_k r_k),  r = log(Q / M)
    forward_kl   (Q - P)/T
    reverse_kl   Q_j (w_j - sum_k Q_k w_k)/T,  w = log(Q / P)

Everything goes through d = log P - log Q, so rows that are equal bit for bit give exactly 0, in value and gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MASKED = -1e30  # what -inf logits become: finite, so that no inf - inf arises


class RowDivergence(NamedTuple):
    """values: [N], the divergences (times the caller's weights). truncated_mass: [N], the student's probability outside the
    teacher's top-k (no gradient; 0 with the full vocabulary)."""

    values: Tensor
    truncated_mass: Tensor


def divergence_rows(
    student_logits: Tensor, teacher_logits: Tensor, *, divergence: str, beta: float, temperature: float, top_k: int | None
) -> RowDivergence:
    """Divergence of each row of two [N, V] logit matrices of the same floating dtype; values keep that dtype.

    beta is read for "jsd" alone. top_k: both distributions are restricted to the teacher's k likeliest tokens and renormalised;
    the student gets no gradient on its mass outside. A row that is all -inf, or holds a NaN, gives NaN.
    """
    truncated_mass = student_logits.new_zeros(len(student_logits))
    if top_k is not None:
        support = teacher_logits.topk(top_k, dim=-1).indices
        student_support = student_logits.gather(-1, support)
        with torch.no_grad():
            inside = torch.logsumexp(student_support / temperature, -1) - torch.logsumexp(student_logits / temperature, -1)
            truncated_mass = -torch.expm1(inside)
        student_logits, teacher_logits = student_support, teacher_logits.gather(-1, support)
    values = _Divergence.apply(student_logits, teacher_logits.detach(), divergence, beta, temperature)
    return RowDivergence(values, truncated_mass)


class _Divergence(torch.autograd.Function):
    """Values in the forward, with the student's gradient beside them when somebody will ask for it."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float) -> Tensor:
        log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
        if divergence == "jsd":
            values, gradient = _jsd(log_p, log_q, beta)
        else:
            values, gradient = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl}[divergence](log_p, log_q)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.div_(temperature))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values[:, None], None, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits.clamp(min=MASKED) / temperature
    log_probs = scaled - torch.logsumexp(scaled, -1, keepdim=True)
    nothing_left = (logits == -torch.inf).all(-1, keepdim=True)
    return log_probs.masked_fill(nothing_left, torch.nan)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Overflow-safe: with L = log(M / max(P, Q)), log(P/M) and log(Q/M) are -L and -L -+ d, never a difference of logs of M."""
    difference = log_p - log_q
    teacher_larger = difference > 0
    distance = difference.abs()
    larger = torch.maximum(log_p, log_q).exp_()
    smaller = larger * torch.exp(-distance)
    p, q = torch.where(teacher_larger, larger, smaller), torch.where(teacher_larger, smaller, larger)
    small_share = beta + (1.0 - 2.0 * beta) * teacher_larger.to(log_p.dtype)  # 1 - beta where the student's is the smaller
    log_m_over_larger = torch.log1p(small_share * torch.expm1(-distance))
    of_larger, of_smaller = -log_m_over_larger, -distance - log_m_over_larger
    log_p_over_m = torch.where(teacher_larger, of_larger, of_smaller)
    log_q_over_m = torch.where(teacher_larger, of_smaller, of_larger)
    values = (beta * p * log_p_over_m + (1.0 - beta) * q * log_q_over_m).sum(-1)
    expected = (q * log_q_over_m).sum(-1, keepdim=True)
    return values, (1.0 - beta) * q * (log_q_over_m - expected)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, log_ratio = log_q.exp(), log_q - log_p
    values = (q * log_ratio).sum(-1)
    return values, q * (log_ratio - values[:, None])
