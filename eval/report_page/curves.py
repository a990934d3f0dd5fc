"""Learning curves as inline SVG: one small chart a metric, the mean of the runs and the band from the
lowest to the highest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from eval.report_page.text import element, plain

Steps = Mapping[int, Mapping[str, float]]  # metrics by step, of one run
Point = tuple[int, float, float, float]  # step, lowest, mean, highest

WIDTH, HEIGHT, MAX_POINTS = 240, 72, 160
FIRST = (
    "reward/mean",
    "reward/em",
    "eval/reward/em",
    "rollout/hop_hit_rate",
    "rollout/searches",
    "rollout/completion_tokens",
    "loss/policy",
    "eval/loss_nats",
    "distill/divergence_nats",
    "distill/grad_ratio",
    "optim/grad_norm",
    "time/step_s",
)


def render_curves(runs: Sequence[Steps], changes: Sequence[tuple[int, str]] = ()) -> tuple[str, str]:
    """The charts of the metrics that people look at first, and of all others. changes: steps at which the
    run's plan was changed, with what it was; a line marks each."""
    names = sorted({name for steps in runs for metrics in steps.values() for name in metrics})
    points = {name: _points(name, runs) for name in names}
    first = {name: points[name] for name in FIRST if name in points}
    others = {name: points[name] for name in names if name not in first}
    return render_charts(first, changes), render_charts(others, changes)


def render_charts(points: Mapping[str, Sequence[Point]], changes: Sequence[tuple[int, str]] = ()) -> str:
    """A chart for each metric that has a point, in the order given. changes: as in `render_curves`."""
    return "".join(_chart(name, own, changes) for name, own in points.items())


def thinned(steps: Sequence[int], values: Sequence[float], most: int = MAX_POINTS) -> list[Point]:
    """One run's metric in at most `most` points: each the mean, the lowest and the highest of 1, 2, 4, ...
    neighbours, at the step of the last of them; the newest value stands by itself at the end. Points stay
    where they are while a run grows, until it takes twice as many neighbours. Values that are not finite
    are left out."""
    known = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    width = 1
    while len(known) > width * (most - 2):
        width *= 2
    points = []
    for start in range(0, len(known) - 1, width):
        part = known[start : min(start + width, len(known) - 1)]
        own = [value for _, value in part]
        points.append((part[-1][0], min(own), math.fsum(own) / len(own), max(own)))
    return [*points, *((step, value, value, value) for step, value in known[-1:])]


def _points(name: str, runs: Sequence[Steps]) -> list[Point]:
    """(step, lowest, mean, highest) over the runs that have the metric at that step, at most MAX_POINTS of
    them."""
    values: dict[int, list[float]] = {}
    for steps in runs:
        for step, metrics in steps.items():
            value = metrics.get(name)
            if value is not None and abs(value) < float("inf"):  # NaN compares false
                values.setdefault(step, []).append(value)
    stride = -(-len(values) // MAX_POINTS) or 1
    chosen = sorted(values)[::-1][::stride][::-1]  # the last step is always among them
    return [
        (step, min(values[step]), sum(values[step]) / len(values[step]), max(values[step])) for step in chosen
    ]


def _chart(name: str, points: Sequence[Point], changes: Sequence[tuple[int, str]]) -> str:
    if not points:
        return ""
    low, high = min(point[1] for point in points), max(point[3] for point in points)
    first, last = points[0][0], points[-1][0]

    def place(step: int, value: float) -> str:
        x = WIDTH * (step - first) / (last - first or 1)
        y = HEIGHT * (1 - (value - low) / (high - low)) if high > low else HEIGHT / 2
        return f"{x:.1f},{y:.1f}"

    upper = [place(step, highest) for step, _, _, highest in points]
    lower = [place(step, lowest) for step, lowest, _, _ in reversed(points)]
    line = " ".join(place(step, mean) for step, _, mean, _ in points)
    inside = [
        (WIDTH * (step - first) / (last - first or 1), words)
        for step, words in changes
        if first <= step <= last
    ]
    marks = "".join(_mark(x, words) for x, words in inside)
    drawing = f'{marks}<polygon points="{" ".join(upper + lower)}"/>{_line(line, len(points))}'
    svg = f'<svg viewBox="-2 -2 {WIDTH + 4} {HEIGHT + 4}" role="img">{drawing}</svg>'
    scale = f"{low:.3g} to {high:.3g} · steps {first} to {last}"
    caption = f"{element('b', plain(name))} {element('span', f'{points[-1][2]:.3g}', 'last')}"
    return element("figure", f"<figcaption>{caption}</figcaption>{svg}{element('small', plain(scale))}")


def _line(places: str, num_points: int) -> str:
    """A lone point is drawn as a dot: a line of no length with round ends."""
    return (
        f'<polyline points="{places}"/>'
        if num_points > 1
        else f'<polyline points="{places} {places}" class="alone"/>'
    )


def _mark(x: float, words: str) -> str:
    """A line through a chart, with what happened there for the pointer that rests on it."""
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}"'
        f' class="change">{element("title", plain(words))}</line>'
    )
