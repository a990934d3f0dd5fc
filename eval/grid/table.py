"""What a grid found: means of the arms, paired differences with intervals, Holm's adjustment; as numbers
and as a table.

Runs are crossed: every start policy meets every seed, and a seed gives all arms the same questions and the
same sampling noise. So start policies and seeds are both resampled, independently (the pigeonhole bootstrap
of Owen, 2007): an effect that holds for one start policy only, or for a few lucky seeds, gets a wide
interval. With few start policies such intervals are rough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.grid.plan import GridConfig, contrasts_of
from eval.grid.records import RunRecord
from eval.statistics import Difference, holm, percentile_interval, smallest_detectable_difference

RATIO = "grad_ratio"


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """Means over the arm's finished runs. grad_ratio: |alpha g_SD| / |g_GRPO|, over its measurements; NaN
    without one."""

    arm: str
    num_runs: int
    outcomes: Mapping[str, float]
    cpu_s: float
    grad_ratio: float


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """arm minus against, over the pairs of runs that both have. p_holm: over the contrasts of this outcome.
    smallest: the difference that so many independent pairs of this spread find with probability 0.8 at
    level 0.05."""

    outcome: str
    arm: str
    against: str
    num_pairs: int
    num_starts: int
    difference: Difference
    p_holm: float
    smallest: float
    by_start: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class GridSummary:
    """Of all finished runs."""

    arms: tuple[ArmSummary, ...]
    contrasts: tuple[Contrast, ...]


def summarize(records: Sequence[RunRecord], config: GridConfig) -> GridSummary:
    """Of the finished runs; a contrast without a common pair is left out."""
    by_arm = {arm: [record for record in records if record.arm == arm] for arm in config.arms}
    arms = tuple(_arm(arm, own, config) for arm, own in by_arm.items() if own)
    contrasts: list[Contrast] = []
    for outcome in config.outcomes:
        found = [_contrast(outcome, arm, against, by_arm, config) for arm, against in contrasts_of(config)]
        found = [contrast for contrast in found if contrast is not None]
        adjusted = holm([contrast.difference.p_value for contrast in found])
        contrasts += [
            dataclasses.replace(contrast, p_holm=p) for contrast, p in zip(found, adjusted, strict=True)
        ]
    return GridSummary(arms=arms, contrasts=tuple(contrasts))


def _arm(arm: str, records: Sequence[RunRecord], config: GridConfig) -> ArmSummary:
    ratios = [own[RATIO] for record in records for own in record.ratios.values() if RATIO in own]
    return ArmSummary(
        arm=arm,
        num_runs=len(records),
        outcomes={name: _mean(record.outcomes[name] for record in records) for name in config.outcomes},
        cpu_s=_mean(record.cost["train_cpu_s"] for record in records),
        grad_ratio=_mean(ratios),
    )


def _contrast(
    outcome: str, arm: str, against: str, by_arm: Mapping[str, Sequence[RunRecord]], config: GridConfig
) -> Contrast | None:
    values = [{(r.start, r.seed): r.outcomes[outcome] for r in by_arm[name]} for name in (arm, against)]
    pairs = sorted(values[0].keys() & values[1].keys())
    if not pairs:
        return None
    differences = {pair: values[0][pair] - values[1][pair] for pair in pairs}
    starts = sorted({start for start, _ in pairs})
    spread = float(np.std(list(differences.values()), ddof=1)) if len(pairs) > 1 else math.nan
    return Contrast(
        outcome=outcome,
        arm=arm,
        against=against,
        num_pairs=len(pairs),
        num_starts=len(starts),
        difference=crossed_bootstrap(differences, num_resamples=config.num_resamples),
        p_holm=math.nan,
        smallest=smallest_detectable_difference(spread, len(pairs)),
        by_start={start: _mean(d for (own, _), d in differences.items() if own == start) for start in starts},
    )


def crossed_bootstrap(
    differences: Mapping[tuple[str, int], float], *, num_resamples: int, seed: int = 0
) -> Difference:
    """Mean of paired differences by (start, seed) with its 95 % percentile interval and two-sided p-value.

    Start policies and seeds are drawn with replacement, independently; a cell counts as often as both were
    drawn. Cells may be missing. The p-value doubles the smaller share of resampled means on one side of 0,
    counting the sample itself.
    """
    starts, seeds = (sorted({pair[axis] for pair in differences}) for axis in (0, 1))
    values, present = np.zeros((2, len(starts), len(seeds)))
    for (start, own_seed), value in differences.items():
        cell = starts.index(start), seeds.index(own_seed)
        values[cell], present[cell] = value, 1.0
    rng = np.random.default_rng(seed)
    start_counts, seed_counts = (
        rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=num_resamples)
        for names in (starts, seeds)
    )
    totals, counts = (
        np.einsum("ra,ab,rb->r", start_counts, table, seed_counts) for table in (values * present, present)
    )
    means = np.divide(totals, counts, out=np.full(num_resamples, np.nan), where=counts > 0)
    mean = float(np.mean(list(differences.values())))
    interval = percentile_interval(mean, means)
    means = means[~np.isnan(means)]
    smaller = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (smaller + 1) / (len(means) + 1))
    return Difference(value=mean, low=interval.low, high=interval.high, p_value=float(p_value))


def to_json(summary: GridSummary) -> dict[str, Any]:
    """Plain numbers; what does not exist is null."""
    return _without_nan(dataclasses.asdict(summary))


def to_markdown(summary: GridSummary, config: GridConfig, missing: Mapping[str, int]) -> str:
    """The tables: the arms, then every outcome's contrasts; the unfinished part of the grid is named above
    them."""
    num_planned = len(config.arms) * len(config.starts) * len(config.seeds)
    num_missing = sum(missing.values())
    lines = [
        f"{num_planned - num_missing} of {num_planned} runs are finished: {len(config.arms)} arms x"
        f" {len(config.starts)} start policies x {len(config.seeds)} seeds."
        + (" The figures below are of a part of the grid." if num_missing else ""),
        "",
        f"| arm | runs | {' | '.join(config.outcomes)} | CPU s | gradient ratio |",
        f"|---|---|{'---|' * len(config.outcomes)}---|---|",
    ]
    for arm in summary.arms:
        figures = " | ".join(f"{arm.outcomes[name]:.3f}" for name in config.outcomes)
        ratio = "" if math.isnan(arm.grad_ratio) else f"{arm.grad_ratio:.2f}"
        lines.append(f"| {arm.arm} | {arm.num_runs} | {figures} | {arm.cpu_s:.1f} | {ratio} |")
    for number, outcome in enumerate(config.outcomes):
        lines += [
            "",
            f"**{outcome}** ({'decides' if number == 0 else 'further outcome'}), paired differences",
            "",
        ]
        lines += [
            "| contrast | pairs | difference [95 %] | p | p (Holm) | could show | by start policy |",
            f"|{'---|' * 7}",
        ]
        lines += [_row(contrast) for contrast in summary.contrasts if contrast.outcome == outcome]
    return "\n".join(lines) + "\n"


def _row(contrast: Contrast) -> str:
    d = contrast.difference
    change = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    smallest = "" if math.isnan(contrast.smallest) else f"{contrast.smallest:.3f}"
    starts = ", ".join(f"{name} {value:+.3f}" for name, value in contrast.by_start.items())
    figures = f"{change} | {d.p_value:.4f} | {contrast.p_holm:.4f} | {smallest}"
    return f"| {contrast.arm} - {contrast.against} | {contrast.num_pairs} | {figures} | {starts} |"


def _mean(values: Any) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
