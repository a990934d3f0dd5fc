"""The policy's loss on rows, one row per sampled token: GRPO's clipped policy gradient, or the likelihood
of stored rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PolicyRows(NamedTuple):
    """All [R] float32. losses: differentiable in the policy's log-probabilities. kl: the k3 estimate,
    likewise (0 without a reference). clipped: 1 where the clip, or the cap, bound. logprob_gap: |policy -
    engine log-probability|. The last two have no gradient."""

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
    clip: float,
    importance_cap: float | None = None,
) -> PolicyRows:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A) with ratio = pi_now / pi_at_sampling (PPO, equation 7;
    GRPO, equation 3).

    importance_cap C replaces the clip by truncated importance sampling (Ionides, 2008): the gradient of a
    token is weighted by min(ratio, C), held constant, -min(sg(ratio), C) A grad log pi_now. The clip drops
    the gradient of tokens that moved too far in the advantage's direction; the cap keeps every token's
    gradient and bounds its weight, whatever the sign, which is what an engine that differs from the
    trainer, or samples a step behind, asks for. `clipped` then marks the weights that were cut.

    All arguments [R] float32; logprobs alone may carry a gradient. The KL to the reference policy is
    Schulman's k3, pi_ref / pi - log(pi_ref / pi) - 1: never negative, unbiased over tokens sampled from pi.
    """
    log_ratio = logprobs - rollout_logprobs
    ratio = log_ratio.exp()
    if importance_cap is None:
        unbounded, bounded = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
        objectives, clipped = torch.minimum(unbounded, bounded), bounded < unbounded
    else:
        weights = ratio.detach().clamp(max=importance_cap)
        objectives = weights * advantages * (logprobs - logprobs.detach()).exp()
        clipped = weights < ratio
    return PolicyRows(
        losses=-objectives,
        kl=_k3(logprobs, reference_logprobs),
        clipped=clipped.detach().float(),
        logprob_gap=log_ratio.detach().abs(),
    )


def likelihood_rows(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor | None,
    *,
    clip: float,  # nothing is clipped
    importance_cap: float | None = None,  # nothing is weighted
) -> PolicyRows:
    """-A log pi_now, whoever sampled the token: no ratio, no clip. With A = 1 the negative log-likelihood
    (nats a token)."""
    return PolicyRows(
        losses=-advantages * logprobs,
        kl=_k3(logprobs, reference_logprobs),
        clipped=torch.zeros_like(logprobs.detach()),
        logprob_gap=(logprobs - rollout_logprobs).detach().abs(),
    )


def _k3(logprobs: Tensor, reference_logprobs: Tensor | None) -> Tensor:
    if reference_logprobs is None:
        return torch.zeros_like(logprobs)
    log_reference_ratio = reference_logprobs - logprobs
    return log_reference_ratio.expm1() - log_reference_ratio


PolicyLoss = Callable[..., PolicyRows]  # with the parameters of policy_rows
POLICY_LOSSES: Mapping[str, PolicyLoss] = {"clipped": policy_rows, "likelihood": likelihood_rows}
