"""Learning curves of a grid as SVG: every arm beside the baseline in a panel of its own, against rollouts and
against CPU seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from eval.grid.records import RunRecord

COLUMNS, PANEL_WIDTH, PANEL_HEIGHT, GAP, TITLE = 4, 172, 96, 34, 34
BASELINE_COLOUR, COLOUR = "#777777", "#1f77b4"
Z_95 = 1.96
COSTS = {"num_rollouts": "rollouts", "train_cpu_s": "CPU seconds of training"}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Of an arm's runs: cost [S] up to each step, mean [S] over runs, half [S] the width of its 95 % band."""

    cost: np.ndarray
    mean: np.ndarray
    half: np.ndarray


def curve_of(runs: Sequence[RunRecord], cost: str) -> Curve:
    """Success of the training rollouts, over the steps that all runs have. cost: a key of RunRecord.cost; a
    run's steps are taken to cost the same. The band is 1.96 standard errors of the mean over runs, 0 of one."""
    steps = min(len(run.curves["em"]) for run in runs)
    values = np.array([run.curves["em"][:steps] for run in runs])
    a_step = np.mean([run.cost[cost] / len(run.curves["em"]) for run in runs])
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(steps)
    return Curve(
        cost=a_step * np.arange(1, steps + 1),
        mean=values.mean(axis=0),
        half=Z_95 * deviation / np.sqrt(len(runs)),
    )


def draw_curves(runs: Mapping[str, Sequence[RunRecord]], baseline: str) -> tuple[str, int]:
    """SVG elements, and their height: for each cost a block of panels, an arm each, all on the same axes.
    runs: by arm; arms without runs are left out."""
    finished = {arm: own for arm, own in runs.items() if own}
    parts, y = [], 0
    for cost, words in COSTS.items():
        curves = {arm: curve_of(own, cost) for arm, own in finished.items()}
        if curves:
            names = {arm: f"{arm} ({len(own)} runs)" for arm, own in finished.items()}
            block, height = _block(curves, names, baseline, words)
            parts.append(f'<g transform="translate(24,{y})">{block}</g>')
            y += height
    return "".join(parts), y


def _block(
    curves: Mapping[str, Curve], names: Mapping[str, str], baseline: str, words: str
) -> tuple[str, int]:
    most_x = max(float(curve.cost[-1]) for curve in curves.values())
    most_y = max(float((curve.mean + curve.half).max()) for curve in curves.values()) or 1.0
    title = f"success of the training rollouts against {words}; mean over runs with its 95 % band"
    parts = [f'<text x="0" y="20" class="title">{title}; grey: {escape(baseline)}</text>']
    rows = -(-len(curves) // COLUMNS)
    for number, (arm, own) in enumerate(curves.items()):
        row, column = divmod(number, COLUMNS)
        x, y = column * (PANEL_WIDTH + 8), TITLE + row * (PANEL_HEIGHT + GAP)
        shown = [(COLOUR, own)]
        if baseline in curves and arm != baseline:
            shown.insert(0, (BASELINE_COLOUR, curves[baseline]))
        lines = "".join(_line(curve, colour, most_x, most_y) for colour, curve in shown)
        parts.append(
            f'<g transform="translate({x},{y})"><text x="0" y="8" class="small">{escape(names[arm])}</text>'
            f'<line class="axis" x1="0" x2="{PANEL_WIDTH}" y1="{PANEL_HEIGHT}" y2="{PANEL_HEIGHT}"/>'
            f'<line class="axis" x1="0" x2="0" y1="12" y2="{PANEL_HEIGHT}"/>{lines}'
            f'<text x="2" y="20" class="small">{most_y:.2f}</text>'
            f'<text x="{PANEL_WIDTH - 30}" y="{PANEL_HEIGHT + 11}" class="small">{most_x:.0f}</text></g>'
        )
    return "".join(parts), TITLE + rows * (PANEL_HEIGHT + GAP) + 10


def _line(curve: Curve, colour: str, most_x: float, most_y: float) -> str:
    def points(values: np.ndarray, order: slice = slice(None)) -> str:
        pairs = zip(curve.cost[order] / most_x, values[order] / most_y)
        return " ".join(
            f"{PANEL_WIDTH * x:.1f},{PANEL_HEIGHT - (PANEL_HEIGHT - 14) * y:.1f}" for x, y in pairs
        )

    upper, lower = curve.mean + curve.half, np.maximum(curve.mean - curve.half, 0.0)
    band = f"{points(upper)} {points(lower, slice(None, None, -1))}"
    return (
        f'<polygon points="{band}" fill="{colour}" fill-opacity="0.18"/>'
        f'<polyline points="{points(curve.mean)}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    )
