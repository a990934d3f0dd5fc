"""The policy's loss on rows, one row per sampled token: GRPO's clipped policy gradient, or the likelihood
of stored rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

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


def policy_rows(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor | None,
    *,
    config: PolicyLossConfig,
) -> PolicyRows:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c_high) A) with ratio = pi_now / pi_at_sampling (PPO, equation 7;
    GRPO, equation 3; c_high apart from c: DAPO, arXiv 2503.14476).

    config.dual_clip d bounds the loss of A < 0 by -d A (Ye et al., 2020), and drops the gradient there.
    config.importance_cap C replaces the clip by truncated importance sampling (Ionides, 2008; the CISPO
    objective): the gradient of a token is weighted by min(ratio, C), held constant, -min(sg(ratio), C) A
    grad log pi_now. The clip drops the gradient of tokens that moved too far in the advantage's direction;
    the cap keeps every token's gradient and bounds its weight, whatever the sign, which is what an engine
    that differs from the trainer, or samples a step behind, asks for. `clipped` then marks the weights that
    were cut.

    All arguments [R] float32; logprobs alone may carry a gradient.
    """
    log_ratio = logprobs - rollout_logprobs
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
        kl=_kl(logprobs, reference_logprobs, ratio, config.kl),
        clipped=clipped.detach().float(),
        logprob_gap=log_ratio.detach().abs(),
    )


def likelihood_rows(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor | None,
    *,
    config: PolicyLossConfig,
) -> PolicyRows:
    """-A log pi_now, whoever sampled the token: no ratio, no clip. With A = 1 the negative log-likelihood
    (nats a token)."""
    log_ratio = logprobs - rollout_logprobs
    return PolicyRows(
        losses=-advantages * logprobs,
        kl=_kl(logprobs, reference_logprobs, log_ratio.exp(), config.kl),
        clipped=torch.zeros_like(logprobs.detach()),
        logprob_gap=log_ratio.detach().abs(),
    )


def _kl(logprobs: Tensor, reference_logprobs: Tensor | None, ratio: Tensor, kind: str) -> Tensor:
    """Estimates of KL(pi || pi_ref) on sampled tokens (Schulman, 2020), with d = log pi - log pi_ref.

    k3, exp(-d) - 1 + d: never negative; as a loss its gradient is that of KL(pi_ref || pi). k2, d^2 / 2: on
    policy its gradient is that of KL(pi || pi_ref). k3_ratio, k3 times pi / pi_at_sampling: that gradient
    off policy too. d itself (k1) has an expected gradient of 0, so it is no loss.
    """
    if reference_logprobs is None:
        return torch.zeros_like(logprobs)
    log_reference_ratio = reference_logprobs - logprobs
    if kind == "k2":
        return 0.5 * log_reference_ratio.square()
    k3 = log_reference_ratio.expm1() - log_reference_ratio
    return k3 * ratio if kind == "k3_ratio" else k3


PolicyLoss = Callable[..., PolicyRows]  # with the parameters of policy_rows
POLICY_LOSSES: Mapping[str, PolicyLoss] = {"clipped": policy_rows, "likelihood": likelihood_rows}
