"""The policy's loss on rows, one row per sampled token: GRPO's clipped policy gradient, or the likelihood
of stored rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_sd.config import PolicyLossConfig


class PolicyRows(NamedTuple):
    """All [R] float32. losses: differentiable in the policy's log-probabilities. kl: the estimate that the
    configuration names, likewise (0 without a reference). clipped: 1 where the clip, or the cap, bound.
    logprob_gap: |policy - engine log-probability|. The last two have no gradient."""

    losses: Tensor
    kl: Tensor
    clipped: Tensor
    logprob_gap: Tensor


class KnownRows(NamedTuple):
    """What is known of rows before the policy reads them, all [R] float32, without gradient.
    rollout_logprobs: the engine's, as sampled. old_logprobs: what ratios are against. reference_logprobs: the
    start policy's, or None. sequence_log_ratios: log pi_now / pi_old, averaged over the row's rollout or turn;
    None: each token has its own."""

    rollout_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    reference_logprobs: Tensor | None = None
    sequence_log_ratios: Tensor | None = None

    def at(self, rows: slice) -> KnownRows:
        """Of some of the rows."""
        some: list[Any] = [None if column is None else column[rows] for column in self]
        return KnownRows(*some)


def policy_rows(logprobs: Tensor, known: KnownRows, *, config: PolicyLossConfig) -> PolicyRows:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c_high) A) with ratio = pi_now / pi_old (PPO, equation 7; GRPO,
    equation 3; c_high apart from c: DAPO, arXiv 2503.14476).

    With known.sequence_log_ratios s every token's ratio has the value exp(s) and the gradient of its own log
    pi_now, exp(s) grad log pi_now (GSPO-token, arXiv 2507.18071, equation 17).

    config.dual_clip d bounds the loss of A < 0 by -d A (Ye et al., 2020), and drops the gradient there.
    config.importance_cap C replaces the clip by truncated importance sampling (Ionides, 2008; the CISPO
    objective): the gradient of a token is weighted by min(ratio, C), held constant, -min(sg(ratio), C) A
    grad log pi_now. The clip drops the gradient of tokens that moved too far in the advantage's direction;
    the cap keeps every token's gradient and bounds its weight, whatever the sign, which is what an engine
    that differs from the trainer, or samples a step behind, asks for. `clipped` then marks the weights that
    were cut.

    logprobs: [R] float32, which alone may carry a gradient.
    """
    advantages = known.advantages
    log_ratio = logprobs - known.old_logprobs
    if known.sequence_log_ratios is not None:
        log_ratio = known.sequence_log_ratios + (logprobs - logprobs.detach())
    ratio = log_ratio.exp()
    if config.importance_cap is None:
        high = config.clip if config.clip_high is None else config.clip_high
        unbounded, bounded = ratio * advantages, ratio.clamp(1.0 - config.clip, 1.0 + high) * advantages
        objectives, clipped = torch.minimum(unbounded, bounded), bounded < unbounded
        if config.dual_clip is not None:
            least = config.dual_clip * advantages.clamp(max=0.0)
            is_cut = (advantages < 0.0) & (objectives < least)
            objectives, clipped = objectives.where(~is_cut, least), clipped | is_cut
    else:
        weights = ratio.detach().clamp(max=config.importance_cap)
        objectives = weights * advantages * (logprobs - logprobs.detach()).exp()
        clipped = weights < ratio
    return PolicyRows(
        losses=-objectives,
        kl=_kl(logprobs, known.reference_logprobs, ratio, config.kl),
        clipped=clipped.detach().float(),
        logprob_gap=(logprobs.detach() - known.rollout_logprobs).abs(),
    )


def likelihood_rows(logprobs: Tensor, known: KnownRows, *, config: PolicyLossConfig) -> PolicyRows:
    """-A log pi_now, whoever sampled the token: no ratio, no clip. With A = 1 the negative log-likelihood
    (nats a token)."""
    log_ratio = logprobs - known.rollout_logprobs
    return PolicyRows(
        losses=-known.advantages * logprobs,
        kl=_kl(logprobs, known.reference_logprobs, log_ratio.exp(), config.kl),
        clipped=torch.zeros_like(logprobs.detach()),
        logprob_gap=log_ratio.detach().abs(),
    )


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """[R]: of each row the mean of `values` [R] over the rows with its number in `sequences` [R] int64, which
    is below R."""
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.index_add_(0, sequences, values)
    counts.index_add_(0, sequences, torch.ones_like(values))
    return (sums / counts.clamp(min=1.0))[sequences]


def _kl(logprobs: Tensor, reference_logprobs: Tensor | None, ratio: Tensor, kind: str) -> Tensor:
    """Estimates of KL(pi || pi_ref) on sampled tokens (Schulman, 2020), with d = log pi - log pi_ref.

    k3, exp(-d) - 1 + d: never negative; as a loss its gradient is that of KL(pi_ref || pi). k2, d^2 / 2: on
    policy its gradient is that of KL(pi || pi_ref). k3_ratio, k3 times the policy loss's ratio: that gradient
    off policy too. d itself (k1) has an expected gradient of 0, so it is no loss: k1_reward takes it off the
    rewards (refinements.py), and is 0 here.
    """
    if reference_logprobs is None:
        return torch.zeros_like(logprobs)
    return KL_LOSSES[kind](reference_logprobs - logprobs, ratio)


def _k3(log_reference_ratio: Tensor) -> Tensor:
    return log_reference_ratio.expm1() - log_reference_ratio


# by policy_loss.kl: of (log pi_ref - log pi, the policy loss's ratio)
KL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k3": lambda log_reference_ratio, ratio: _k3(log_reference_ratio),
    "k2": lambda log_reference_ratio, ratio: 0.5 * log_reference_ratio.square(),
    "k3_ratio": lambda log_reference_ratio, ratio: _k3(log_reference_ratio) * ratio,
    "k1_reward": lambda log_reference_ratio, ratio: torch.zeros_like(log_reference_ratio),
}


PolicyLoss = Callable[..., PolicyRows]  # with the parameters of policy_rows
POLICY_LOSSES: Mapping[str, PolicyLoss] = {"clipped": policy_rows, "likelihood": likelihood_rows}
