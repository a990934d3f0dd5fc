"""The divergence of a teacher's and a student's token distributions, row by row: the oracle.

Plain torch, any floating dtype and device; tests judge every other implementation against this one, and
this one against float64 autograd of the textbook formula. With z = logits / temperature, P =
softmax(teacher), Q = softmax(student):

    jsd(beta)    beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q,  0 < beta < 1
    forward_kl   KL(P || Q)
    reverse_kl   KL(Q || P)
    mse          sum_k (P_k - Q_k)^2, of probabilities

The teacher gets no gradient. The student's gradient is computed in the forward, from closed forms:

    jsd          (1 - beta)/T * Q_j (r_j - sum_k Q_k r_k),  r = log(Q / M)
    forward_kl   (Q - P)/T
    reverse_kl   Q_j (w_j - sum_k Q_k w_k)/T,  w = log(Q / P)
    mse          Q_j (w_j - sum_k Q_k w_k)/T,  w = 2 (Q - P)

Everything goes through d = log P - log Q, so rows that are equal bit for bit give exactly 0, in value and
gradient.

With top_k both distributions are restricted to the k likeliest tokens S of one of them (support) and
renormalised; which tokens these are has no gradient. A tail bucket (TRL's and SDPO's add_tail) keeps what
lies outside instead: k + 1 events, the last of probability 1 - sum over S. With b(j) the event of token j,
its gradient is that of the event shared out by probability, for jsd (1 - beta)/T * Q_j (r_b(j) - sum_b Q_b
r_b).

With entry_clip c the value is sum_k min(f_k, c) over the summands f_k. The gradient is then that of the
summands which were not cut: with g_k = d f_k / d log Q_k, 0 where f_k > c, it is (g_j - Q_j sum_k g_k)/T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sd.ops.divergence import Divergence

MASKED = -1e30  # what -inf logits become: finite, so that no inf - inf arises


class RowDivergence(NamedTuple):
    """values: [N], the divergences (times the caller's weights). truncated_mass: [N], the student's
    probability outside the support (no gradient; 0 with the full vocabulary), whether or not a tail
    bucket holds it."""

    values: Tensor
    truncated_mass: Tensor


def divergence_rows(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> RowDivergence:
    """Divergence of each row of two [N, V] logit matrices of the same floating dtype; values keep that dtype.

    With a top_k, the student gets no gradient on its mass outside, unless a tail_bucket holds it. A row that
    is all -inf, or holds a NaN, gives NaN.
    """
    top_k, temperature = divergence.top_k, divergence.temperature
    teacher_logits = teacher_logits.detach()
    truncated_mass = student_logits.new_zeros(len(student_logits))
    if top_k is not None:
        chosen_by = teacher_logits if divergence.support == "teacher" else student_logits.detach()
        support = chosen_by.topk(top_k, dim=-1).indices
        truncated_mass = _mass_outside(student_logits.detach(), support, temperature)
        events = _events_with_tail if divergence.tail_bucket and top_k < student_logits.shape[-1] else _events
        student_logits = events(student_logits, support, temperature)
        teacher_logits = events(teacher_logits, support, temperature)
    wants_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    values = _Divergence.apply(student_logits, teacher_logits, divergence, wants_gradient)
    values = values * divergence.scale
    return RowDivergence(values.masked_fill(truncated_mass.isnan(), torch.nan), truncated_mass)


def _events(logits: Tensor, support: Tensor, temperature: float) -> Tensor:
    """[N, k] logits of the support alone."""
    return logits.gather(-1, support)


def _events_with_tail(logits: Tensor, support: Tensor, temperature: float) -> Tensor:
    """[N, k + 1] logits: those of the support, and one of the same probability as everything outside
    together."""
    outside = logits.scatter(-1, support, MASKED).clamp(min=MASKED) / temperature
    tail = torch.logsumexp(outside, -1, keepdim=True) * temperature
    return torch.cat([logits.gather(-1, support), tail], -1)


def _mass_outside(logits: Tensor, support: Tensor, temperature: float) -> Tensor:
    inside = torch.logsumexp(logits.gather(-1, support) / temperature, -1) - torch.logsumexp(
        logits / temperature, -1
    )
    return -torch.expm1(inside)


class _Divergence(torch.autograd.Function):
    """Values in the forward, with the student's gradient beside them when somebody will ask for it."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, divergence: Divergence, wants_gradient: bool
    ) -> Tensor:
        temperature = divergence.temperature
        log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
        terms = divergence_terms(log_p, log_q, divergence)
        values = terms.values.sum(-1)
        if wants_gradient:
            gradient = terms.slopes.addcmul_(terms.q, terms.slopes.sum(-1, keepdim=True), value=-1.0)
            ctx.save_for_backward(gradient.div_(temperature))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_values[:, None], None, None, None


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Of logits / temperature, with -inf as MASKED; rows of nothing but -inf become NaN."""
    log_probs = torch.log_softmax(logits.clamp(min=MASKED) / temperature, -1)
    nothing_left = (logits == -torch.inf).all(-1, keepdim=True)
    return log_probs.masked_fill(nothing_left, torch.nan)


class Terms(NamedTuple):
    """A divergence entry by entry, all [N, V]: it is the sum of `values`, and its gradient with respect to
    logits / temperature is slopes - q * sum(slopes). q: the student's probabilities. values and slopes may
    be one tensor."""

    values: Tensor
    slopes: Tensor
    q: Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Terms:
    """From log-probabilities [N, V] of the teacher and the student, of which kind, beta and entry_clip make
    the terms; entries of a row may be a part of its vocabulary."""
    if divergence.kind == "jsd":
        terms = _jsd(log_p, log_q, divergence.beta)
    else:
        terms = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "mse": _mse}[divergence.kind](
            log_p, log_q
        )
    clip = divergence.entry_clip
    return terms if clip is None else _clipped(terms, divergence.kind, clip)


def _clipped(terms: Terms, kind: str, clip: float) -> Terms:
    """The terms with every summand cut from above; those that were cut have no slope."""
    # Taken away from the whole row's, so that a row of which nothing is cut keeps its bits. The KLs leave out
    # of their slopes what a whole row's sum cancels: d f / d log Q is -P, or f + Q.
    left_out = {"forward_kl": -terms.q, "reverse_kl": terms.q}.get(kind)
    slopes = terms.slopes if left_out is None else terms.slopes + left_out
    of_cut = slopes.masked_fill(terms.values <= clip, 0.0)
    return Terms(terms.values.clamp(max=clip), terms.slopes - of_cut, terms.q)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Terms:
    """Overflow-safe: with L = log(M / max(P, Q)), log(P/M) and log(Q/M) are -L and -L -+ d, never a
    difference of logs of M."""
    # M lies between P and Q, so log(M / larger) = log1p(share * (e^-distance - 1)) needs no sum of tiny
    # numbers, and equal rows give a distance of 0 and with it exactly 0.
    difference = log_p - log_q
    teacher_larger = difference > 0
    distance = difference.abs()
    larger = torch.maximum(log_p, log_q).exp_()
    smaller = larger * torch.exp(-distance)
    p, q = torch.where(teacher_larger, larger, smaller), torch.where(teacher_larger, smaller, larger)
    # 1 - beta where the student's is the smaller
    small_share = beta + (1.0 - 2.0 * beta) * teacher_larger.to(log_p.dtype)
    log_m_over_larger = torch.log1p(small_share * torch.expm1(-distance))
    of_larger, of_smaller = -log_m_over_larger, -distance - log_m_over_larger
    log_p_over_m = torch.where(teacher_larger, of_larger, of_smaller)
    slopes = (1.0 - beta) * q * torch.where(teacher_larger, of_smaller, of_larger)
    return Terms(beta * p * log_p_over_m + slopes, slopes, q)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    """The slopes Q - P sum to 0 over the whole vocabulary."""
    p, q = log_p.exp(), log_q.exp()
    return Terms(p * (log_p - log_q), q - p, q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Terms:
    q = log_q.exp()
    values = q * (log_q - log_p)
    return Terms(values, values, q)


def _mse(log_p: Tensor, log_q: Tensor) -> Terms:
    """A difference of probabilities as a share of the larger one: equal rows give exactly 0, close ones
    keep their digits."""
    distance = (log_p - log_q).abs()
    apart = -torch.maximum(log_p, log_q).exp() * torch.expm1(-distance)
    q = log_q.exp()
    return Terms(apart * apart, 2.0 * q * torch.where(log_q > log_p, apart, -apart), q)
