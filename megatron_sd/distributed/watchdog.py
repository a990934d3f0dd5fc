"""Ends a run that is stuck: every rank prints where each of its threads is, and exits, so that nobody waits
for a rank for ever.

Each rank's thread reports to a store how often its main thread has moved, and in which phase; the first
rank's thread judges. A rank is at fault when its thread has not reported for `timeout_s` (it died, or
something holds the interpreter), or when its main thread has not moved for so long although it waits for no
other rank; so are all, when all wait for each other.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import torch.distributed as dist

from megatron_sd.distributed.pulses import PULSES_NAME, RankPulse, keep_written
from megatron_sd.distributed.world import World
from megatron_sd.door import STUCK_EXIT_CODE

TICKS_PER_TIMEOUT = 20
MAX_TICK_S = 10.0
GRACE = 0.2  # of the timeout: how long a main thread may take to end by itself when another rank has ended
LAST_RESORT = 1.25  # of the timeout: then a rank that cannot even run its thread is ended by C code

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank says about itself. ticks: of its thread; moves: of its main thread; waits: for other
    ranks, in a collective."""

    ticks: int
    moves: int
    phase: str
    waits: bool


@dataclass(kw_only=True)
class _Seen:
    """The newest report of a rank, and when its two counts last changed (seconds of the judge's clock)."""

    report: Report | None = None
    ticked: float
    moved: float

    def update(self, report: Report | None, now: float) -> None:
        if report is not None and (self.report is None or report.ticks != self.report.ticks):
            self.ticked = now
        if report is not None and (self.report is None or report.moves != self.report.moves):
            self.moved = now
        self.report = report or self.report


@dataclass
class Judge:
    """Decides from reports alone; pure but for what it remembers. now: seconds of any steady clock."""

    size: int
    timeout_s: float
    start: float
    seen: list[_Seen] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = [_Seen(ticked=self.start, moved=self.start) for _ in range(self.size)]

    def verdict(self, reports: Mapping[int, Report], now: float) -> str | None:
        """Who is at fault and what every rank is doing, or None."""
        for rank, own in enumerate(self.seen):
            own.update(reports.get(rank), now)
        for rank, own in enumerate(self.seen):
            if now - own.ticked > self.timeout_s:
                return f"rank {rank} has not been heard of for {now - own.ticked:.1f} s; {self._all(now)}"
        late = [rank for rank, own in enumerate(self.seen) if now - own.moved > self.timeout_s]
        at_fault = [rank for rank in late if not self.seen[rank].report.waits]
        if not at_fault and len(late) == self.size:
            at_fault = late
        if not at_fault:
            return None
        first = min(at_fault, key=lambda rank: self.seen[rank].moved)
        phase = self.seen[first].report.phase
        return (
            f"rank {first} is stuck in phase {phase} for {now - self.seen[first].moved:.1f} s;"
            f" {self._all(now)}"
        )

    def pulses(self, now: float) -> list[RankPulse]:
        """Of every rank, as it was last heard."""
        return [
            RankPulse(
                phase=own.report.phase if own.report else "start",
                waits=own.report is not None and own.report.waits,
                moved_s=now - own.moved,
                heard_s=now - own.ticked,
            )
            for own in self.seen
        ]

    def _all(self, now: float) -> str:
        parts = []
        for rank, own in enumerate(self.pulses(now)):
            waits = ", waits for others" if own.waits else ""
            parts.append(f"rank {rank}: {own.phase}{waits}, moved {own.moved_s:.1f} s ago")
        return "; ".join(parts)


class Watchdog:
    """Watches from `start` to `stop`; a timeout of 0 watches nothing. Stacks go to stderr and to
    directory/rank_N.txt; what ranks were last heard doing, while all is well, to directory/pulses.json."""

    def __init__(self, world: World, *, timeout_s: float, directory: Path):
        self._world = world
        self._timeout_s = timeout_s
        self._path = directory / f"rank_{world.rank}.txt"
        self._tick_s = min(timeout_s / TICKS_PER_TIMEOUT, MAX_TICK_S)
        self._stopped = threading.Event()
        self._ticks = 0
        self._file: TextIO | None = None

    def start(self) -> None:
        """Collective: the ranks share a store."""
        if self._timeout_s == 0.0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        self._store = self._own_store()
        self._judge = Judge(self._world.size, self._timeout_s, time.monotonic())
        self._world.pulse.move("start")
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self._world.is_first:
            threading.Thread(target=self._tell, name="pulses", daemon=True).start()

    def stop(self) -> None:
        """The run is over, well or not; the process may take its time to end."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _tell(self) -> None:
        """What the ranks do, for people; apart from the thread that judges, which no disk may hold up."""
        path, judge = self._path.with_name(PULSES_NAME), self._judge
        keep_written(path, lambda: judge.pulses(time.monotonic()), self._stopped, timeout_s=self._timeout_s)

    def _own_store(self) -> dist.Store:
        """A connection of the thread's own to the store of the process group."""
        if self._world.size == 1:
            return dist.HashStore()
        return dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())

    def _arm(self) -> None:
        """The last resort is due so long after the thread's last turn; it needs no interpreter."""
        faulthandler.dump_traceback_later(self._timeout_s * LAST_RESORT, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stopped.wait(self._tick_s):
            self._arm()
            try:
                verdict = self._exchange()
            except (RuntimeError, ValueError) as error:  # the store went with the first rank
                verdict = f"the first rank is gone ({type(error).__name__})"
                if self._stopped.wait(self._timeout_s * GRACE):
                    return
            if verdict is not None and not self._stopped.is_set():
                self._end(verdict)

    def _exchange(self) -> str | None:
        """Report, and hear or give the verdict."""
        self._ticks += 1
        pulse = self._world.pulse
        report = Report(ticks=self._ticks, moves=pulse.moves, phase=pulse.phase, waits=pulse.waits)
        self._store.set(f"rank/{self._world.rank}", json.dumps(vars(report)))
        ranks = range(self._world.size) if self._world.is_first else (0,)
        keys = {rank: f"rank/{rank}" for rank in ranks}
        reports = {
            rank: Report(**json.loads(self._store.get(key)))
            for rank, key in keys.items()
            if self._store.check([key])
        }
        if not self._world.is_first:
            return (
                self._store.get("verdict").decode()
                if self._store.check(["verdict"])
                else self._first_is_silent(reports)
            )
        verdict = self._judge.verdict(reports, time.monotonic())
        if verdict is not None:
            self._store.set("verdict", verdict)
        return verdict

    def _first_is_silent(self, reports: Mapping[int, Report]) -> str | None:
        first, now = self._judge.seen[0], time.monotonic()
        first.update(reports.get(0), now)
        return (
            f"rank 0 has not been heard of for {now - first.ticked:.1f} s"
            if now - first.ticked > self._timeout_s
            else None
        )

    def _end(self, verdict: str) -> NoReturn:
        """Say why, print every thread's stack, and leave without waiting for anything."""
        text = (
            f"watchdog: {verdict}; rank {self._world.rank} was in phase {self._world.pulse.phase}; its"
            " stacks:\n"
        )
        os.write(2, text.encode())
        faulthandler.dump_traceback(all_threads=True)
        self._file.write(text)
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.flush()
        if self._world.is_first:
            # the others read the verdict in this rank's store
            time.sleep(min(2 * self._tick_s, self._timeout_s * GRACE))
        os._exit(STUCK_EXIT_CODE)
