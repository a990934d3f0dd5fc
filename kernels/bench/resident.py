"""Memory of one action: how far resident memory rises above what was there before (Linux with glibc)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def extra_mib(action: Callable[[], object]) -> float:
    """Peak resident memory while the action runs over that before it, sampled every millisecond."""
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier actions would hide what this one takes
    before = peak = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
