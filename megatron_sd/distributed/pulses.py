"""What every rank was last heard doing, as a file of the run: watchdog/pulses.json. It is for people and for
`sd-search watch`; nothing decides by it.

The first rank writes it, in a thread of its own: a disk that hangs holds up neither training nor the thread
that judges. Once in a few seconds, a few dozen bytes a rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sd.durable.files import write_whole

PULSES_NAME = "pulses.json"
WRITE_EVERY_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankPulse:
    """What a rank is doing. waits: for other ranks, in a collective. moved_s, heard_s: seconds since its main
    thread moved, and since its thread reported."""

    phase: str
    waits: bool
    moved_s: float
    heard_s: float


@dataclass(frozen=True, kw_only=True)
class Pulses:
    """All ranks, in their order. written: seconds since 1970, by the clock of the first rank. timeout_s:
    after how long without a move the watchdog ends the run."""

    written: float
    timeout_s: float
    ranks: tuple[RankPulse, ...]


def keep_written(
    path: Path,
    pulses: Callable[[], Sequence[RankPulse]],
    over: threading.Event,
    *,
    timeout_s: float,
    every_s: float = WRITE_EVERY_S,
) -> None:
    """Write what `pulses` says now and every `every_s` seconds until `over` is set. A disk that refuses is
    told once; the run does without the file."""
    told = False
    while True:
        known = Pulses(written=time.time(), timeout_s=timeout_s, ranks=tuple(pulses()))
        try:
            write_whole(path, json.dumps(dataclasses.asdict(known)) + "\n")
        except OSError as error:
            if not told:
                logger.warning("%s cannot be written (%s): nobody can watch the ranks by it", path, error)
            told = True
        if over.wait(every_s):
            return


def read_pulses(path: Path) -> Pulses | None:
    """What the file says; None without a readable one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Pulses(**fields | {"ranks": tuple(RankPulse(**rank) for rank in fields["ranks"])})
    return None
