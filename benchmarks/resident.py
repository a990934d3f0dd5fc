"""Memory of one action: how far resident memory rises above what was there before (Linux with glibc)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Of this process, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def anonymous_bytes() -> int:
    """Resident memory of this process that belongs to no file. Slow to ask for: milliseconds."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) * 1024


def extra_mib(
    action: Callable[[], object], num_bytes: Callable[[], int] = resident_bytes, every_s: float = 0.001
) -> float:
    """Peak memory while the action runs over that before it, by `num_bytes`, sampled every `every_s`
    seconds."""
    # what the allocator keeps of earlier actions would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    before = peak = num_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every_s):
            peak = max(peak, num_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return (peak - before) / 2**20
