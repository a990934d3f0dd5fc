"""The grid as one SVG file: a panel of intervals for every outcome, and the arms' learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from eval.grid.curves import draw_curves
from eval.grid.plan import GridConfig
from eval.grid.records import RunRecord
from eval.grid.table import Contrast, GridSummary

WIDTH, LABEL, ROW, TITLE, MARGIN = 760, 250, 20, 34, 24


def draw(records: Sequence[RunRecord], summary: GridSummary, config: GridConfig) -> str:
    """The whole picture."""
    parts, y = [], 0
    for outcome in config.outcomes:
        contrasts = [contrast for contrast in summary.contrasts if contrast.outcome == outcome]
        if contrasts:
            parts.append(f'<g transform="translate(0,{y})">{_intervals(outcome, contrasts)}</g>')
            y += TITLE + ROW * len(contrasts) + MARGIN
    curves, height = draw_curves(
        {arm: [r for r in records if r.arm == arm] for arm in config.arms}, config.baseline
    )
    parts.append(f'<g transform="translate(0,{y})">{curves}</g>')
    y += height + MARGIN
    style = (
        "text { font: 12px sans-serif } .title { font-weight: bold } .small { font-size: 10px } .axis {"
        " stroke: #999 }"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">'
    return (
        f'{head}<style>{style}</style><rect width="{WIDTH}" height="{y}"'
        f' fill="white"/>{"".join(parts)}</svg>\n'
    )


def _intervals(outcome: str, contrasts: Sequence[Contrast]) -> str:
    """A dot and its interval for each contrast, on one scale with 0 in it."""
    ends = [end for c in contrasts for end in (c.difference.low, c.difference.high, 0.0)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - MARGIN) * (value - low) / span

    bottom = TITLE + ROW * len(contrasts)
    parts = [
        _text(MARGIN, 20, f"{outcome}: paired differences with 95 % intervals", "title"),
        f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TITLE - 6}" y2="{bottom}"/>',
        _text(x(low), bottom + 10, f"{low:+.3f}", "small"),
        _text(x(high) - 30, bottom + 10, f"{high:+.3f}", "small"),
    ]
    for number, contrast in enumerate(contrasts):
        d, y = contrast.difference, TITLE + ROW * number + 8
        colour = "#d62728" if d.high < 0 else "#2ca02c" if d.low > 0 else "#555555"
        parts += [
            _text(MARGIN, y + 4, f"{contrast.arm} - {contrast.against} (n={contrast.num_pairs})"),
            (
                f'<line x1="{x(d.low):.1f}" x2="{x(d.high):.1f}" y1="{y}" y2="{y}" stroke="{colour}"'
                ' stroke-width="2"/>'
            ),
            f'<circle cx="{x(d.value):.1f}" cy="{y}" r="4" fill="{colour}"/>',
        ]
    return "".join(parts)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'
