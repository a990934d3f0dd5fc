"""The ranks' pulses: what each was last heard doing, and how long ago it moved."""

from __future__ import annotations

from eval.report_page.text import element, plain
from eval.watch.standing import age_words
from megatron_sd.distributed.pulses import Pulses, RankPulse

LATE = 0.5  # of the watchdog's timeout without a move: worth a look
SILENT_S = 30.0  # a rank's thread reports every ten seconds at least


def render_pulses(pulses: Pulses | None, *, now: float, is_over: bool) -> str:
    """One line a rank. now: seconds since 1970. is_over: nothing runs, so that they are of the past."""
    if pulses is None:
        return element(
            "p",
            "No pulses: the run has not begun, safety.watchdog_s is 0, or it is of an older version.",
            "facts",
        )
    age = max(0.0, now - pulses.written)
    note = (
        f"The run is over: this is how its ranks were {age_words(age)} ago."
        if is_over
        else f"Written {age_words(age)} ago; without a move for {age_words(pulses.timeout_s)}"
        " (safety.watchdog_s) the watchdog ends the run."
    )
    ranks = "".join(
        _rank(number, own, 0.0 if is_over else age, pulses.timeout_s)
        for number, own in enumerate(pulses.ranks)
    )
    return element("p", plain(note), "facts") + element("ol", ranks, "ranks")


def _rank(number: int, own: RankPulse, age: float, timeout_s: float) -> str:
    moved = own.moved_s + age
    kind = "late" if moved > LATE * timeout_s else "waits" if own.waits else "moves"
    waits = ", waits for others" if own.waits else ""
    silent = f", not heard of for {age_words(own.heard_s + age)}" if own.heard_s > SILENT_S else ""
    words = (
        f"{element('b', f'rank {number}')} {plain(own.phase)}{waits}, moved {age_words(moved)} ago{silent}"
    )
    return element("li", words, kind)
