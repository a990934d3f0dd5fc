"""An event loop in a thread of its own, for connections that outlive the rollouter's loops, which end with
every batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Value = TypeVar("Value")


class LoopThread:
    """Runs coroutines for callers in any thread; ends with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def start(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Begin; cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Wait for the work; not from the loop itself."""
        return self.start(work).result()

    def stop(self) -> None:
        """End the thread; nothing may be running."""
        self._loop.call_soon_threadsafe(self._loop.stop)
