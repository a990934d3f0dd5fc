"""What a refused step leaves behind is dropped."""

from __future__ import annotations

import deepspeed


def forget_gradients(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> None:
    """Drop what an engine has accumulated since its last step, at any ZeRO stage."""
    optimizer = engine.optimizer
    (engine if zero_stage == 0 else optimizer).zero_grad()
    if zero_stage in (1, 2):  # their zero_grad leaves what earlier backwards have reduced
        optimizer.all_grad_tensors.update(dict.fromkeys(optimizer.all_grad_tensors))
