"""The question DeepSpeed asks before every optimiser step, answered by us as well: may a gradient of this
norm be taken?"""

from __future__ import annotations

import math

from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor


class NormGate:
    """Refuses norms that are not finite, as DeepSpeed does, and those above `limit`. The norm is that of
    the whole gradient and the same on every rank, so all ranks refuse the same step; DeepSpeed then leaves
    parameters and optimiser as they are.

    spike: the finite norm that was refused last; None since the last `open`.
    """

    def __init__(self) -> None:
        self._limit = math.inf
        self.spike: float | None = None

    def open(self, limit: float) -> None:
        """For one step. limit: infinite for none."""
        self._limit, self.spike = limit, None

    def __call__(self, norm: Tensor | float) -> bool:
        """True: refuse."""
        if is_invalid_grad_norm(norm):
            return True
        if float(norm) <= self._limit:
            return False
        self.spike = float(norm)
        return True


GATE = NormGate()  # of all that a process trains; opened before each step
for _module in (stage3, stage_1_and_2, bf16_optimizer):
    _module.is_invalid_grad_norm = GATE
