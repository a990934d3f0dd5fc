"""The newest groups of rollouts, side by side, with what the filters say of each."""

from __future__ import annotations

from collections.abc import Sequence

from eval.report_page.groups import Record, render_group, render_legend
from eval.report_page.text import counted, element, plain
from eval.watch.filters import tags
from eval.watch.following import Transcripts


def readable(groups: Sequence[Record]) -> list[Record]:
    """Those that can be shown: records as training writes them."""
    return [group for group in groups if _rendered(group, "") is not None]


def render_groups(newest: Transcripts | None, shown: Sequence[Record], every: int | None) -> str:
    """`shown` of the newest transcripts; without any, when they are to be expected. every: in how many steps
    the run writes them; 0: never; None: not known."""
    if newest is None:
        return element("p", plain(_when(every)), "facts")
    place = f"step {newest.step}"
    often = f", every {counted(every, 'step')}" if every else ""
    told = (
        f"{counted(len(shown), 'group')} of step {newest.step}. Transcripts hold the first groups of a step"
        f"{often} (log.transcripts_every, log.transcripts_per_step)."
    )
    missing = newest.unreadable + len(newest.groups) - len(shown)
    if missing:
        told += f" Passed over: {counted(missing, 'line')} that cannot be read as transcripts."
    legend = element("div", render_legend(shown), "told")
    return (
        element("p", plain(told), "facts")
        + legend
        + "".join(_rendered(group, place) or "" for group in shown)
    )


def _when(every: int | None) -> str:
    if every == 0:
        return "This run writes no transcripts (log.transcripts_every is 0)."
    if every is None:
        return "No transcripts yet."
    often = counted(every, "step")
    return f"No transcripts yet: they are written every {often} (log.transcripts_every)."


def _rendered(group: Record, place: str) -> str | None:
    try:
        return render_group(group, place, trained=True, tags=tags, folds=True)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
