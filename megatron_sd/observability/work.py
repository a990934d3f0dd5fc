"""What is being done within a step or an evaluation: a bar on a terminal, a line every 30 s anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 30.0
BAR_EVERY_S = 0.2


class Work:
    """Shows tasks on `stream` (None: nowhere, as on every rank but the first). Work that is done within 30 s leaves no line.

    clock: seconds of any steady clock.
    """

    def __init__(self, stream: TextIO | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def on(self, name: str, total: int, unit: str) -> Iterator[Task]:
        """A task of `total` units, shown while the block runs. Tasks may stand within each other, and run in threads."""
        if self._stream is None:
            task = Task(total, self._clock)
        else:
            task = (_Bar if self._stream.isatty() else _Lines)(total, self._clock, self._stream, name, unit)
        try:
            yield task
        finally:
            task.close()


class Task:
    """Counts of what is done; shows nothing itself."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total = total
        self.done = self.tokens = 0
        self._clock = clock
        self.start = self._shown_at = clock()

    def add(self, done: int = 0, tokens: int = 0) -> None:
        """So many more units are done, and so many more tokens were sampled or read."""
        self.done += done
        self.tokens += tokens
        self.tick()

    def tick(self) -> None:
        """Time goes by: show what there is when it is time to."""

    def close(self) -> None:
        """The task is over."""

    @property
    def rate(self) -> str:
        """Tokens a second since the start, in words; nothing for work that counts none."""
        seconds = self._clock() - self.start
        return f"{self.tokens:,} tokens, {self.tokens / seconds:,.1f} tokens/s" if self.tokens and seconds > 0 else ""

    def is_due(self, every_s: float) -> bool:
        """True once in `every_s` seconds."""
        if self._clock() - self._shown_at < every_s:
            return False
        self._shown_at = self._clock()
        return True


class _Lines(Task):
    def __init__(self, total: int, clock: Callable[[], float], stream: TextIO, name: str, unit: str) -> None:
        super().__init__(total, clock)
        self._stream, self._name, self._unit = stream, name, unit

    def tick(self) -> None:
        if self.is_due(LINE_EVERY_S):
            counts = f"{self._name}: {self.done} of {self.total} {self._unit}"
            seconds = f"{self._clock() - self.start:.0f} s"
            print(*filter(None, [counts, self.rate, seconds]), sep=", ", file=self._stream, flush=True)


class _Bar(Task):
    def __init__(self, total: int, clock: Callable[[], float], stream: TextIO, name: str, unit: str) -> None:
        super().__init__(total, clock)
        self._bar = tqdm(total=total, desc=name, unit=f" {unit}", file=stream, leave=False, dynamic_ncols=True)

    def tick(self) -> None:
        if self.is_due(BAR_EVERY_S) or self.done == self.total:
            self._bar.n = self.done
            self._bar.set_postfix_str(self.rate)

    def close(self) -> None:
        self._bar.close()


SILENT = Work(None)
