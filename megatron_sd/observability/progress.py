"""What a person watching sees: of the steps of a run, and of the work within a step or an evaluation.

On a terminal bars; anywhere else one line a step, and one every 30 s for work that takes longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 30.0
BAR_EVERY_S = 0.2
TICK_S = 0.1
# metric -> how it is called here
_SHOWN = {
    "reward/mean": "reward",
    "reward/em": "em",
    "rollout/hop_hit_rate": "hits",
    "rollout/searches": "searches",
    "loss/policy": "loss",
    "distill/divergence_nats": "jsd",
    "eval/reward/em": "eval em",
    "eval/reward/f1": "eval f1",
    "eval/reward/format_valid": "eval form",
    "eval/rollout/searches": "eval searches",
    "eval/loss_nats": "eval loss",
}


class Progress:
    """Shows each recorded step on `stream`."""

    def __init__(self, num_steps: int, step: int, stream: TextIO) -> None:
        """num_steps: the last step of the run; step: where it begins."""
        self._num_steps = num_steps
        self._stream = stream
        self._bar = (
            tqdm(total=num_steps, initial=step, file=stream, unit="step", dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move to `step` and show its main figures."""
        figures = [f"{label} {metrics[name]:z.3f}" for name, label in _SHOWN.items() if name in metrics]
        if "time/step_s" in metrics:
            figures.append(f"{metrics['time/step_s']:.2f} s")
        if self._bar is None:
            print(f"step {step}/{self._num_steps}", *figures, sep="  ", file=self._stream, flush=True)
            return
        self._bar.set_postfix_str(", ".join(figures), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the finished bar on the terminal."""
        if self._bar is not None:
            self._bar.close()


class Work:
    """Shows tasks on `stream` (None: nowhere, as on every rank but the first). Work that is done within 30
    s leaves no line.

    clock: seconds of any steady clock.
    """

    def __init__(self, stream: TextIO | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def on(self, name: str, total: int, unit: str) -> Iterator[Task]:
        """A task of `total` units, shown while the block runs. Tasks may stand within each other, and run
        in threads."""
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

    async def keep_ticking(self) -> None:
        """Tick until cancelled, beside what is awaited meanwhile."""
        while True:
            self.tick()
            await asyncio.sleep(TICK_S)

    def close(self) -> None:
        """The task is over."""

    @property
    def rate(self) -> str:
        """Tokens a second since the start, in words; nothing for work that counts none."""
        seconds = self._clock() - self.start
        return (
            f"{self.tokens:,} tokens, {self.tokens / seconds:,.1f} tokens/s"
            if self.tokens and seconds > 0
            else ""
        )

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
        self._bar = tqdm(
            total=total, desc=name, unit=f" {unit}", file=stream, leave=False, dynamic_ncols=True
        )

    def tick(self) -> None:
        if self.is_due(BAR_EVERY_S) or self.done == self.total:
            self._bar.n = self.done
            self._bar.set_postfix_str(self.rate)

    def close(self) -> None:
        self._bar.close()


SILENT = Work(None)
