"""Where the time and the memory of a step went."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_GIB = 2**30
_MAXRSS_BYTES = 1024  # ru_maxrss counts KiB on Linux


class Timers:
    """Wall-clock seconds of one step, by phase. The step begins with its first phase. on_phase: told of
    every one that begins."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = defaultdict(float)
        self._step_start: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`. A GPU in use is waited for at both ends."""
        _wait_for_device()
        self._on_phase(name)
        start = time.perf_counter()
        if self._step_start is None:
            self._step_start = start
        try:
            yield
        finally:
            _wait_for_device()
            self._seconds[name] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """time/<phase>_s of every phase and time/step_s since the first one began; then forget them. Empty
        without a phase."""
        if self._step_start is None:
            return {}
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        metrics["time/step_s"] = time.perf_counter() - self._step_start
        self._seconds.clear()
        self._step_start = None
        return metrics


def memory_metrics() -> dict[str, float]:
    """mem/peak_gib: peak resident memory of this process. mem/gpu_peak_gib: peak on a GPU in use since the
    last call."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
    metrics = {"mem/peak_gib": peak / _GIB}
    if torch.cuda.is_initialized():
        metrics["mem/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        torch.cuda.reset_peak_memory_stats()
    return metrics


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
