"""Divergence, log-probability and entropy of rows whose vocabulary is sharded across tensor-parallel ranks.

Rank k holds columns [start, start + num_real) of every row, and perhaps padding columns after them. What
ranks tell each other is a few float64 numbers a row: log-normalisers first (and with the KL divergences a
mean, which already makes the value), then for jsd the sums of its terms; the gradient of a rank's own
columns follows without another word.

    jsd                     two rounds: gather (lse_s, lse_t), sum (D, K)          4 numbers
    forward_kl, reverse_kl  one round: gather (lse_s, lse_t, E)                    3 numbers
    log-probability         one round: gather (lse, E, the target's logit)         3 numbers

    forward_kl = E_P[z_t - z_s] - lse_t + lse_s,    reverse_kl = E_Q[z_s - z_t] - lse_s + lse_t,    entropy = lse - E_Q[z]

Every rank gets the same bits: sums over ranks are taken from gathered numbers, in rank order. A head of
which every rank has some rows W_k: `logits = F.linear(replicated(hidden, shard), W_k)` has dH summed over
ranks, and dW_k local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sd.errors import ConfigError
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd_reference import MASKED, Terms, divergence_terms
from megatron_sd.ops.row_softmax import entropy_gradient, working_dtype


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """This rank's columns of the vocabulary: num_real from number `start` on; further columns of a matrix
    are padding and get no gradient. num_real may be 0. gather: a tensor of each rank -> [ranks, ...] in
    rank order, the same on every rank. width: what own_rows pads to, the same number on every rank; needed
    there only."""

    start: int
    num_real: int
    gather: Callable[[Tensor], Tensor]
    width: int | None = None


def replicated(hidden: Tensor, shard: VocabShard) -> Tensor:
    """The same tensor, whose gradient is summed over ranks: put it before what every rank does a part of."""
    return _Replicated.apply(hidden, shard)


def own_rows(weight: Tensor, shard: VocabShard) -> Tensor:
    """[width] or [width, H]: this rank's part of a head [V] or [V, H] of which every rank has all, and rows
    of 0 after it. The gradient is that of the whole head, on every rank."""
    return _OwnRows.apply(weight, shard)


def vocab_parallel_divergence(
    student_logits: Tensor, teacher_logits: Tensor, shard: VocabShard, divergence: Divergence
) -> Tensor:
    """[N] divergences of rows of which this rank has columns [N, V_k]; formulas: ops/jsd_reference.py.

    Differentiable in student_logits; every rank must hand in the same gradient. Arithmetic is float32
    (float64 stays). All ranks call together, with the same rows. A row of nothing but -inf gives NaN.
    Raises ConfigError for mse, for a top_k, and for an entry_clip.
    """
    if divergence.kind == "mse":
        raise ConfigError(
            "distill.divergence is 'mse', expected jsd, forward_kl or reverse_kl where the vocabulary is"
            " sharded"
        )
    if divergence.top_k is not None:
        raise ConfigError(
            f"distill.top_k is {divergence.top_k}, expected null where the vocabulary is sharded"
        )
    if divergence.entry_clip is not None:
        raise ConfigError(
            f"distill.entry_clip is {divergence.entry_clip}, expected null where the vocabulary is sharded"
        )
    columns = slice(0, shard.num_real)
    student, teacher = student_logits[:, columns], teacher_logits.detach()[:, columns]
    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    return _Divergence.apply(student, teacher, shard, divergence, wants_gradient) * divergence.scale


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, shard: VocabShard, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """([N] log softmax(logits / temperature)[target], [N] entropies in nats). targets: [N] of the whole
    vocabulary. Differentiable in logits; every rank must hand in the same gradients."""
    return _Logprobs.apply(logits[:, : shard.num_real], targets, shard, temperature)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        parts = ctx.shard.gather(gradient.to(working_dtype(gradient.dtype)))
        return parts.sum(0).to(gradient.dtype), None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard, ctx.size = shard, len(weight)
        own = weight[shard.start : shard.start + shard.num_real]
        missing = (len(own) if shard.width is None else shard.width) - len(own)
        return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own.view_as(own)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return ctx.shard.gather(gradient).flatten(0, 1)[: ctx.size], None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd hands everything on by position)
        ctx,
        student: Tensor,
        teacher: Tensor,
        shard: VocabShard,
        divergence: Divergence,
        wants_gradient: bool,
    ) -> Tensor:
        temperature = divergence.temperature
        z_s, z_t = _scaled(student, temperature), _scaled(teacher, temperature)
        if divergence.kind == "jsd":
            ends = shard.gather(torch.stack([_log_sum(z_s), _log_sum(z_t)]))
            lse_s, lse_t = torch.logsumexp(ends, 0)
            terms = divergence_terms(_minus(z_t, lse_t), _minus(z_s, lse_s), divergence)
            values, slope = shard.gather(torch.stack([_total(terms.values), _total(terms.slopes)])).sum(0)
        else:
            values, terms, (lse_s, lse_t) = _kl(z_s, z_t, shard, divergence)
            slope = values if divergence.kind == "reverse_kl" else torch.zeros_like(values)
        if wants_gradient:
            gradient = terms.slopes.addcmul(terms.q, slope[:, None].to(terms.q.dtype), value=-1.0)
            ctx.save_for_backward(gradient.div_(temperature))
            ctx.dtype = student.dtype
        nothing_left = torch.minimum(lse_s, lse_t) <= 0.5 * MASKED / temperature
        return values.masked_fill(nothing_left, torch.nan).to(z_s.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_values[:, None]).to(ctx.dtype), None, None, None, None


def _kl(z_s: Tensor, z_t: Tensor, shard: VocabShard, divergence: Divergence) -> tuple[Tensor, Terms, Tensor]:
    """Values and this rank's terms of the KL divergence from its own side to the other, and both
    log-normalisers."""
    is_forward = divergence.kind == "forward_kl"
    own, other = (z_t, z_s) if is_forward else (z_s, z_t)
    parts = shard.gather(torch.stack([_log_sum(z_s), _log_sum(z_t), _mean(own, own - other)]))
    lse_s, lse_t = torch.logsumexp(parts[:, :2], 0)
    lse_own, lse_other = (lse_t, lse_s) if is_forward else (lse_s, lse_t)
    shares = torch.exp(parts[:, 1 if is_forward else 0] - lse_own)
    values = (shares * parts[:, 2]).sum(0) - (lse_own - lse_other)
    terms = divergence_terms(_minus(z_t, lse_t), _minus(z_s, lse_s), divergence)
    return values, terms, torch.stack([lse_s, lse_t])


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, shard: VocabShard, temperature: float
    ) -> tuple[Tensor, Tensor]:
        z = _scaled(logits, temperature)
        own = targets - shard.start
        is_here = (own >= 0) & (own < shard.num_real)
        own = own.where(is_here, 0)
        chosen = torch.full_like(targets, -torch.inf, dtype=torch.float64)
        if shard.num_real:
            chosen = chosen.where(~is_here, z.gather(-1, own[:, None])[:, 0].double())
        parts = shard.gather(torch.stack([_log_sum(z), _mean(z, z), chosen]))
        lse = torch.logsumexp(parts[:, 0], 0)
        entropies = (lse - (torch.exp(parts[:, 0] - lse) * parts[:, 1]).sum(0)).to(z.dtype)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_minus(z, lse).exp_(), own, is_here, entropies)
            ctx.temperature, ctx.dtype = temperature, logits.dtype
        return (parts[:, 2].amax(0) - lse).to(z.dtype), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropies: Tensor | None):
        probabilities, own, is_here, entropies = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropies)
        slopes = grad_logprobs / ctx.temperature
        gradient = probabilities * -slopes[:, None]
        if grad_entropies is not None:
            gradient += entropy_gradient(probabilities, entropies, grad_entropies / ctx.temperature)
        if gradient.shape[1]:
            gradient.scatter_add_(-1, own[:, None], (slopes * is_here)[:, None])
        return gradient.to(ctx.dtype), None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(working_dtype(logits.dtype)).clamp(min=MASKED) / temperature


def _total(entries: Tensor) -> Tensor:
    return entries.sum(-1, dtype=torch.float64)


def _log_sum(z: Tensor) -> Tensor:
    """[N] float64 log sum exp(z) of this rank's columns; -inf without any."""
    if z.shape[1] == 0:
        return z.new_full((len(z),), -torch.inf, dtype=torch.float64)
    highest = z.amax(-1)
    return highest.double() + _total(torch.exp(z - highest[:, None])).log()


def _mean(z: Tensor, of: Tensor) -> Tensor:
    """[N] float64 mean of `of` under softmax(z) of this rank's columns; 0 without any."""
    if z.shape[1] == 0:
        return z.new_zeros(len(z), dtype=torch.float64)
    weights = torch.exp(z - z.amax(-1, keepdim=True))
    return _total(weights * of) / _total(weights)


def _minus(z: Tensor, normaliser: Tensor) -> Tensor:
    """z - normaliser [N] float64, with the digits that z's dtype cannot hold of it subtracted after those
    that it can."""
    rounded = normaliser.to(z.dtype)
    return (z - rounded[:, None]).sub_((normaliser - rounded).to(z.dtype)[:, None])
