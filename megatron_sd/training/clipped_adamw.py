"""AdamW for ZeRO stage 0, where DeepSpeed leaves the step to the bare optimiser."""

from __future__ import annotations

import math

import torch

from megatron_sd.training.safety.norm_limit import GATE


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and skips a step whose norm the gate refuses, as DeepSpeed's
    sharded optimisers do.

    DeepSpeed reads `overflow` (the step was skipped) and `_global_grad_norm` after each step. max_grad_norm
    0: no clipping.
    """

    def __init__(
        self, parameters, *, max_grad_norm: float, lr: float, betas: tuple[float, float], weight_decay: float
    ):
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self._max_grad_norm = max_grad_norm or math.inf
        self._global_grad_norm = 0.0
        self.overflow = False

    def step(self, closure=None):
        """Clip, then step, or leave everything as it is."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        self.overflow = GATE(self._global_grad_norm)
        return None if self.overflow else super().step(closure)
