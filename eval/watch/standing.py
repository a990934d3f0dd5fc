"""How a run stands, told by its directory alone: whether it trains, has ended or was ended, and what its
ranks do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sd.durable.run_lock import STALE_S, Holder

_GOES_ON = "the same command goes on from its newest checkpoint"
_MOST_CHARACTERS = 500  # of what a watchdog said


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What there is to judge by. step, num_steps: the newest recorded step, and the last one of the plan.
    holder: who holds, or held, the directory. lives: whether the holder does; None: not known yet. stuck:
    what the watchdog said as it ended the run."""

    step: int | None
    num_steps: int | None
    holder: Holder | None
    lives: bool | None
    stuck: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """kind: training, unknown, finished, stopped or waiting (to begin). words: who trains, or what is known."""

    kind: str
    words: str


def standing(signs: Signs) -> Standing:
    """What the signs mean."""
    holder, stuck = signs.holder, f" ({signs.stuck})" if signs.stuck else ""
    if holder is not None and signs.lives:
        return Standing(kind="training", words=str(holder))
    if holder is not None and signs.lives is None:
        words = f"held by {holder}: another machine, which has up to {STALE_S:.0f} s to give a sign of life"
        return Standing(kind="unknown", words=words)
    if holder is not None:
        words = f"{holder}, is gone and did not end by itself{stuck}; {_GOES_ON}"
        return Standing(kind="stopped", words=words)
    if signs.step is None:
        words = "no step has been recorded, and nothing runs in this directory"
        return Standing(kind="waiting", words=words)
    if signs.num_steps is None:
        return Standing(
            kind="unknown", words="nothing runs in this directory; how many steps it was to take is not known"
        )
    if signs.step >= signs.num_steps:
        return Standing(kind="finished", words="every step of the plan is done")
    return Standing(kind="stopped", words=f"before the last step of the plan{stuck}; {_GOES_ON}")


class LifeSigns:
    """Whether the holder of a directory lives: on this machine by its process, on another one by its beats.
    clock: seconds of any steady clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[str, int] | None = None  # the holder's token and beats
        self._since = 0.0
        self._has_beaten = False

    def lives(self, holder: Holder | None) -> bool | None:
        """None: of another machine, and seen for too short a time. Ask every few seconds."""
        if holder is None:
            self._seen = None
            return False
        if holder.is_here:
            return holder.is_alive
        now, own = self._clock(), (holder.token, holder.beats)
        if own != self._seen:
            self._has_beaten = self._seen is not None and self._seen[0] == holder.token
            self._seen, self._since = own, now
        if now - self._since > STALE_S:
            return False
        return True if self._has_beaten else None


def watchdog_words(path: Path) -> str:
    """Why the watchdog ended the run, from its file of stacks; nothing when it did not."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            line = file.readline(_MOST_CHARACTERS)
    except OSError:
        return ""
    return line.strip() if line.startswith("watchdog: ") else ""


def age_words(seconds: float) -> str:
    """How long ago, as people say it; a clock that runs behind counts as now.

    >>> [age_words(s) for s in (-3, 12.4, 90, 7500, 200000)]
    ['0 s', '12 s', '1 min 30 s', '2 h 5 min', '2 days']
    """
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} days"
