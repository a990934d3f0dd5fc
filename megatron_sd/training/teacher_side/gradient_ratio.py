"""How large the distillation's gradient is beside GRPO's, measured exactly, and the weight alpha that
follows from it.

A measuring step makes three passes over its batch: the GRPO term, then L_SD on groups with reward spread,
then L_SD on groups without. The accumulated gradient is looked at after each; its sum is the same gradient
an ordinary step accumulates in one pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.config import AlphaConfig, DistillConfig
from megatron_sd.distributed.collectives import sum_floats
from megatron_sd.errors import ConfigError
from megatron_sd.training.policy import Policy

SMOOTHING = 0.5  # share of the newest measurement in the running |grad L_SD| / |grad L_GRPO|


@dataclass(frozen=True, kw_only=True)
class GradientRatio:
    """Of one step, with alpha in it: |alpha g_SD| / |g_GRPO|, the same for the groups without spread alone,
    and the cosine of g_SD and g_GRPO. None where a gradient is zero."""

    alpha: float
    overall: float | None
    no_spread: float | None
    cosine: float | None

    @classmethod
    def of(cls, alpha: float, products: Sequence[float]) -> GradientRatio:
        """From gradient_products, summed over ranks."""
        policy_square, distill_square, no_spread_square, product = products
        if policy_square == 0.0 or distill_square == 0.0:
            return cls(alpha=alpha, overall=None, no_spread=None, cosine=None)
        return cls(
            alpha=alpha,
            overall=(distill_square / policy_square) ** 0.5,
            no_spread=(no_spread_square / policy_square) ** 0.5,
            cosine=product / (distill_square * policy_square) ** 0.5,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """By TensorBoard name, without those that are None."""
        named = {
            "distill/grad_ratio": self.overall,
            "distill/grad_ratio_no_spread": self.no_spread,
            "distill/grad_cosine": self.cosine,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class AlphaSchedule:
    """The weight of L_SD, step by step; a pure value. unit_ratio: running |g_SD| / |g_GRPO| at alpha 1,
    None before the first measurement."""

    config: AlphaConfig
    measure_every: int
    unit_ratio: float | None = None

    def alpha(self, step: int) -> float:
        """0 during warm-up; then config.value, or target_ratio / unit_ratio capped at max_value. In mode
        grad_ratio config.value is the probe of the first measurement."""
        if step < self.config.warmup_steps:
            return 0.0
        if self.config.mode == "fixed" or self.unit_ratio is None:
            return self.config.value
        return min(self.config.target_ratio / self.unit_ratio, self.config.max_value)

    def measures(self, step: int) -> bool:
        """The step is a measuring one: every measure_every steps from the end of warm-up on, and in mode
        grad_ratio every step until the first measurement succeeded."""
        if self.measure_every == 0 or self.alpha(step) == 0.0:
            return False
        waiting = self.config.mode == "grad_ratio" and self.unit_ratio is None
        return waiting or (step - self.config.warmup_steps) % self.measure_every == 0

    def after(self, ratio: GradientRatio) -> AlphaSchedule:
        """The schedule that has seen this measurement; a step without a finite gradient on both sides
        teaches nothing."""
        if not ratio.overall or not math.isfinite(ratio.overall):
            return self
        unit = ratio.overall / ratio.alpha
        if self.unit_ratio is not None:
            unit = SMOOTHING * unit + (1.0 - SMOOTHING) * self.unit_ratio
        return dataclasses.replace(self, unit_ratio=unit)


class AlphaController:
    """Tells the trainer which passes a step makes, and looks at the gradient after each.

    for weights in controller.passes(step):
        for microbatch in batch:
            policy.accumulate(microbatch, batch.totals, weights)
        controller.observe(policy)
    """

    def __init__(self, config: DistillConfig, policy_weight: float):
        """policy_weight: of L_GRPO, policy_loss.weight. Raises ConfigError where the ratio is needed and never
        measured."""
        if config.alpha.mode == "grad_ratio" and config.measure_every == 0:
            raise ConfigError(
                "distill.measure_every is 0, expected at least 1 when distill.alpha.mode is grad_ratio"
            )
        self.schedule = AlphaSchedule(config=config.alpha, measure_every=config.measure_every)
        self._distils = config.block != "none"
        self._policy_weight = policy_weight
        self._alpha = 0.0  # of the current step
        self._ratio: GradientRatio | None = None  # of the current step, if it measured
        self._accumulated: list[list[Tensor]] | None = None  # after each pass of a measuring step

    def passes(self, step: int) -> Iterator[TermWeights]:
        """One pass, or three on a measuring step."""
        alpha = self._alpha = self.schedule.alpha(step) if self._distils else 0.0
        self._ratio, self._accumulated = None, None
        if not (self._distils and self.schedule.measures(step)):
            yield TermWeights(policy=self._policy_weight, distill_spread=alpha, distill_no_spread=alpha)
            return
        self._accumulated = []
        yield TermWeights(policy=self._policy_weight, distill_spread=0.0, distill_no_spread=0.0)
        yield TermWeights(policy=0.0, distill_spread=alpha, distill_no_spread=0.0)
        yield TermWeights(policy=0.0, distill_spread=0.0, distill_no_spread=alpha)

    def observe(self, policy: Policy) -> None:
        """The current pass has been accumulated. The third one completes the measurement; alpha follows
        from the next step on."""
        if self._accumulated is None:
            return
        if len(self._accumulated) < 2:
            self._accumulated.append([gradient.clone() for gradient in policy.local_gradients()])
            return
        after_policy, after_spread = self._accumulated
        products = gradient_products(after_policy, after_spread, policy.local_gradients())
        self._accumulated = None
        self._ratio = GradientRatio.of(self._alpha, sum_floats(policy.world, products))
        self.schedule = self.schedule.after(self._ratio)

    def metrics(self) -> dict[str, float]:
        """Of the last step, by TensorBoard name; nothing without distillation."""
        if not self._distils:
            return {}
        return {"distill/alpha": self._alpha} | (self._ratio.metrics if self._ratio else {})

    def state(self) -> dict[str, float | None]:
        """For the checkpoint."""
        return {"unit_ratio": self.schedule.unit_ratio}

    def load_state(self, state: dict[str, float | None]) -> None:
        """What state() gave."""
        self.schedule = dataclasses.replace(self.schedule, unit_ratio=state["unit_ratio"])


def gradient_products(
    after_policy: list[Tensor], after_spread: list[Tensor], total: list[Tensor]
) -> list[float]:
    """|g_GRPO|^2, |g_SD|^2, |g_SD of groups without spread|^2 and g_GRPO . g_SD of this rank's partitions,
    in float64, from what was accumulated after each of the three passes."""
    products = torch.zeros(4, dtype=torch.float64, device=total[0].device)
    for first, second, third in zip(after_policy, after_spread, total, strict=True):
        policy, distill, no_spread = first.double(), (third - first).double(), (third - second).double()
        products += torch.stack([policy @ policy, distill @ distill, no_spread @ no_spread, policy @ distill])
    return products.tolist()
