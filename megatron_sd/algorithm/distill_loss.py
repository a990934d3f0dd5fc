"""How the two terms of the loss are weighed: L = weight * L_GRPO + alpha * mean over distilled rollouts of
their mean divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0  # beyond it a ratio is cut on either side before any cap, as in SDPO's code


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """What one pass over the batch accumulates: policy * L_GRPO + distill * L_SD, with L_SD split by its
    groups' spread.

    Groups whose rewards are all equal give GRPO no gradient but still distil; a measuring pass looks at
    them apart.
    """

    policy: float
    distill_spread: float
    distill_no_spread: float

    @property
    def distils(self) -> bool:
        """The teacher is needed at all."""
        return self.distill_spread != 0.0 or self.distill_no_spread != 0.0


POLICY_TERM = TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
EVERY_TERM = TermWeights(policy=1.0, distill_spread=1.0, distill_no_spread=1.0)


def query_row_weights(query_weights: Tensor, in_spread: Tensor, weights: TermWeights) -> Tensor:
    """[Q] float32 weight of every query row: alpha of its group times 1 / query tokens of its rollout (0:
    not in this pass).

    Divided by the global number of distilled rollouts (records.Totals), the weighted sum of the rows'
    divergences is alpha times the mean over rollouts of the mean over query tokens (docs/method.md, section
    1).
    """
    alpha = torch.where(in_spread, weights.distill_spread, weights.distill_no_spread)
    return alpha.to(query_weights.dtype) * query_weights


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_now / pi_at_sampling, cap), the weight of a token's divergence where rollouts are off policy
    (truncated importance sampling, Ionides, 2008; SDPO, arXiv 2601.20802, and SDFT, arXiv 2601.19897, with a
    cap of 2). The log-ratio is held within +-LARGEST_LOG_RATIO. Arguments and result [Q], of one floating
    dtype; no gradient."""
    log_ratio = (logprobs - rollout_logprobs).detach()
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp().clamp(max=cap)
