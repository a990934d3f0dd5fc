"""Where the seconds of the newest steps went, as a table of stacked bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.report_page.text import element, plain
from eval.watch.following import Column

STEP = "time/step_s"
MOST_STEPS = 12
NUM_COLOURS = 6  # of watch.css: .phase0, .phase1, ...
REST = "rest"
_ORDER = ("rollout", "assemble", "update", "publish")
_BAR_HEIGHT = 5


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, and of each phase of it; what no phase counts is the rest."""

    step: int
    seconds: float
    phases: Mapping[str, float]


def newest_times(columns: Mapping[str, Column], most: int = MOST_STEPS) -> list[StepTime]:
    """The newest steps that were timed, newest first."""
    if STEP not in columns:
        return []
    names = {name: name[len("time/") : -len("_s")] for name in columns if _is_phase(name)}
    ordered = sorted(names, key=lambda name: _place(names[name]))
    found = []
    for step in reversed(columns[STEP].steps[-most:]):
        seconds = columns[STEP].at(step) or 0.0
        phases = {names[name]: value for name in ordered if (value := columns[name].at(step)) is not None}
        found.append(
            StepTime(
                step=step, seconds=seconds, phases=phases | {REST: max(0.0, seconds - sum(phases.values()))}
            )
        )
    return found


def render_phases(times: Sequence[StepTime]) -> str:
    """One bar a step, all on one scale, and what each colour means with its median seconds."""
    if not times:
        return element("p", "No step has been timed yet.", "facts")
    names = list(dict.fromkeys(name for own in times for name in own.phases if name != REST)) + [REST]
    legend = "".join(
        f'<span><i class="swatch {_colour(place, name)}"></i>{plain(name)}'
        f" {statistics.median(own.phases.get(name, 0.0) for own in times):.3g} s</span>"
        for place, name in enumerate(names)
    )
    longest = max(max(own.seconds, sum(own.phases.values())) for own in times) or 1.0
    rows = "".join(
        f"<tr><th>step {own.step}</th><td>{_bar(own, names, longest)}</td><td>{own.seconds:.3g} s</td></tr>"
        for own in times
    )
    return element("p", f"median of {len(times)} steps: {legend}", "facts phases") + element(
        "table", rows, "phases"
    )


def _bar(own: StepTime, names: Sequence[str], longest: float) -> str:
    parts, start = [], 0.0
    for place, name in enumerate(names):
        width = 100 * own.phases.get(name, 0.0) / longest
        told = element("title", plain(f"{name} {own.phases.get(name, 0.0):.3g} s"))
        parts.append(
            f'<rect x="{start:.2f}" y="0" width="{width:.2f}" height="{_BAR_HEIGHT}"'
            f' class="{_colour(place, name)}">{told}</rect>'
        )
        start += width
    return (
        f'<svg viewBox="0 0 100 {_BAR_HEIGHT}" preserveAspectRatio="none" role="img">{"".join(parts)}</svg>'
    )


def _colour(place: int, name: str) -> str:
    return "phase-rest" if name == REST else f"phase{place % NUM_COLOURS}"


def _is_phase(name: str) -> bool:
    return name.startswith("time/") and name.endswith("_s") and name != STEP


def _place(phase: str) -> tuple[int, str]:
    return (_ORDER.index(phase) if phase in _ORDER else len(_ORDER), phase)
