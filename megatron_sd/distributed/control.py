"""Asking a run to stop: by a file, by a signal, by the clock. It saves what it has and ends with exit code
85: start it again.

    run_dir/control/STOP     made by anybody; removed once the run has saved, so that the next start trains
    SIGUSR1, SIGTERM         to any rank
    safety.stop_after_s      by the run's own clock

This module imports nothing but the standard library, so that a rank listens before torch is loaded.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Self

# set by `sd-search`: its process, "pid start", without which ranks do not go on
STARTER = "MEGATRON_SD_STARTER"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
FILE_CHECK_S = 0.5  # a shared file system is asked no more often


class StopRequest:
    """Whether this rank has been asked to stop, and why. Other ranks learn of it by
    `distributed.collectives.agree`."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._file: Path | None = None
        self._deadline = float("inf")  # by time.monotonic
        self._next_check = 0.0

    @classmethod
    def listen(cls) -> Self:
        """From now on signals are requests. Main thread only."""
        request = cls()
        for number in SIGNALS:
            signal.signal(number, request._on_signal)
        return request

    def watch(self, run_dir: Path, stop_after_s: float | None) -> None:
        """The run's stop file and its time, counted from now, are requests too."""
        self._file = run_dir / "control" / "STOP"
        self._deadline = time.monotonic() + stop_after_s if stop_after_s else float("inf")

    @property
    def reason(self) -> str | None:
        """Why this rank shall stop; None: it shall not."""
        now = time.monotonic()
        if self._reason is None and now >= self._deadline:
            self._reason = "the time of safety.stop_after_s is up"
        if self._reason is None and self._file is not None and now >= self._next_check:
            self._next_check = now + FILE_CHECK_S
            if self._file.exists():
                self._reason = f"{self._file} exists"
        return self._reason

    def served(self) -> None:
        """The run has saved: the file shall not stop the next one, too. First rank only."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = self._reason or f"signal {signal.Signals(number).name}"
