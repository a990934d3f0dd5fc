"""A divergence that looks at the sampled token alone: the reverse KL by one sample."""

from __future__ import annotations

from torch import Tensor


def sampled_divergence(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """[q] log Q(x) - log P(x) of the sampled tokens x, of which the student's and the teacher's
    log-probabilities [q] are given.

    On policy its mean is KL(Q || P), and so is the mean of its gradient that divergence's: (log Q - log P)
    grad log Q, of a difference held constant (the form of OPSD, arXiv 2601.18734, and of SDPO in TRL, which
    call its negative an advantage). Differentiable in logprobs alone.
    """
    difference = (logprobs - teacher_logprobs).detach()
    return difference * (logprobs - logprobs.detach()).exp()
