"""The learning rate of a step: a linear warm-up, then the schedule that optimizer.schedule names. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from megatron_sd.config import OptimizerConfig

Schedule = Callable[[float, float], float]


def _constant(_progress: float, _final_ratio: float) -> float:
    return 1.0


def _linear(progress: float, final_ratio: float) -> float:
    return final_ratio + (1.0 - final_ratio) * (1.0 - progress)


def _cosine(progress: float, final_ratio: float) -> float:
    return final_ratio + (1.0 - final_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


# Each gives the share of optimizer.learning_rate. Progress: 0 at the end of the warm-up, 1 at the last step.
SCHEDULES: Mapping[str, Schedule] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimiser step `step`, which is 0 for the first of `num_steps`.

    The rate rises in equal parts to learning_rate, which step warmup_steps - 1 has. Then a schedule that
    decays brings it down to final_ratio * learning_rate, which the last step has and every step after it
    keeps. A warm-up as long as the run leaves no step to decay over.

    >>> config = OptimizerConfig(learning_rate=8.0, warmup_steps=2, schedule="linear", final_ratio=0.25)
    >>> [learning_rate(step, 5, config) for step in range(6)]
    [4.0, 8.0, 6.0, 4.0, 2.0, 2.0]
    """
    num_warm = max(config.warmup_steps, 1)
    if step + 1 < num_warm:
        return config.learning_rate * ((step + 1) / num_warm)
    num_left = num_steps - num_warm
    progress = min((step + 1 - num_warm) / num_left, 1.0) if num_left > 0 else 0.0
    return config.learning_rate * SCHEDULES[config.schedule](progress, config.final_ratio or 0.0)
