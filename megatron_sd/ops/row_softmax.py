"""Softmax of rows of logits, with as few [rows, vocabulary] matrices as can be: one beside the logits,
which are used up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sd.ops.jsd_reference import MASKED


class RowSoftmax(NamedTuple):
    """exponentials [N, V] of logits / temperature less its maximum, and their sums [N]; in nats, entropies
    [N] and the targets' logprobs [N] (None without targets)."""

    exponentials: Tensor
    sums: Tensor
    entropies: Tensor
    logprobs: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, temperature: float, targets: Tensor | None = None) -> RowSoftmax:
        """logits: [N, V] float32 or float64, overwritten. targets: [N] int64. -inf is a probability of 0; a
        row of nothing else, or with a NaN or +inf, is NaN."""
        if temperature != 1.0:
            logits.div_(temperature)
        logits.sub_(logits.amax(-1, keepdim=True))
        exponentials = logits.exp()
        sums = exponentials.sum(-1)
        log_sums = sums.log()
        logprobs = None if targets is None else logits.gather(-1, targets[:, None]).squeeze(-1) - log_sums
        entropies = log_sums - logits.clamp_(min=MASKED).mul_(exponentials).sum(-1) / sums
        return cls(exponentials, sums, entropies, logprobs)

    def gradient(
        self, slopes: Tensor, targets: Tensor, temperature: float, *, entropy_slopes: Tensor | None = None
    ) -> Tensor:
        """[N, V]: of sum(slopes * logprobs + entropy_slopes * entropies) with respect to the logits:
        ((onehot - p) slopes - p (log p + entropy) entropy_slopes) / temperature, p the softmax. It takes the
        memory of the exponentials."""
        slopes = slopes / temperature
        of_entropies = (
            None if entropy_slopes is None else self._entropy_gradient(entropy_slopes / temperature)
        )
        gradient = self.exponentials.mul_(-(slopes / self.sums)[:, None])
        gradient = gradient.scatter_add_(-1, targets[:, None], slopes[:, None])
        return gradient if of_entropies is None else gradient.add_(of_entropies)

    def _entropy_gradient(self, slopes: Tensor) -> Tensor:
        return entropy_gradient(self.exponentials / self.sums[:, None], self.entropies, slopes)


def entropy_gradient(probabilities: Tensor, entropies: Tensor, slopes: Tensor) -> Tensor:
    """[N, V]: -p (log p + H) slopes, of sum(slopes * H) with respect to the logits. A probability of 0 has
    none. entropies H, slopes: [N]."""
    logs = probabilities.log().clamp_(min=MASKED)
    return logs.add_(entropies[:, None]).mul_(probabilities).mul_(-slopes[:, None])


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of this dtype are worked on in: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
