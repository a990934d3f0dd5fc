"""Many requests, one search thread: a bounded queue whose waiting queries are searched together.

A vector index is not safe to search from several threads, and batches are faster. While a batch is being
searched the next one gathers by itself, so nobody waits for a timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_sd.records import Hit

Found = list[tuple[Hit, ...]]


class QueueFullError(Exception):
    """The queue has no room for a request; it should come again a little later."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Part of a request, at most a batch long, and where its hits are awaited."""

    queries: Sequence[str]
    top_k: int
    found: asyncio.Future[Found]


class SearchQueue:
    """search: (queries, top_k) to the hits of each; called in one thread, never twice at a time. The limits
    count queries."""

    def __init__(
        self, search: Callable[[Sequence[str], int], Found], *, max_queued: int, max_batch: int
    ) -> None:
        self._search = search
        self._max_queued = max_queued
        self._max_batch = max_batch
        self._waiting: deque[_Piece] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self.num_queued = 0
        self.num_batches = 0

    async def submit(self, queries: Sequence[str], top_k: int) -> Found:
        """The hits of each query. Raises QueueFullError, and what the search raised."""
        if self.num_queued + len(queries) > self._max_queued:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        pieces = [
            _Piece(queries=queries[start : start + self._max_batch], top_k=top_k, found=loop.create_future())
            for start in range(0, len(queries), self._max_batch)
        ]
        self._waiting.extend(pieces)
        self.num_queued += len(queries)
        self._wake.set()
        return [hits for found in await asyncio.gather(*(piece.found for piece in pieces)) for hits in found]

    async def run(self) -> None:
        """Search batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wake.wait()
                batch = self._next_batch()
                if batch:
                    await self._answer(loop, batch)
        finally:
            self._thread.shutdown(wait=False)

    def _next_batch(self) -> list[_Piece]:
        """The longest waiting pieces that ask for one top_k and fit a batch; those nobody awaits any more
        are dropped."""
        batch: list[_Piece] = []
        num_queries = 0
        while self._waiting:
            piece = self._waiting[0]
            is_wanted = not piece.found.done()
            fits = not batch or (
                piece.top_k == batch[0].top_k and num_queries + len(piece.queries) <= self._max_batch
            )
            if is_wanted and not fits:
                break
            self._waiting.popleft()
            if is_wanted:
                batch.append(piece)
                num_queries += len(piece.queries)
            else:
                self.num_queued -= len(piece.queries)
        if not self._waiting:
            self._wake.clear()
        return batch

    async def _answer(self, loop: asyncio.AbstractEventLoop, batch: Sequence[_Piece]) -> None:
        """Search a batch, each different query once, and hand every piece its own hits or the error."""
        different = list(dict.fromkeys(query for piece in batch for query in piece.queries))
        try:
            found = await loop.run_in_executor(self._thread, self._search, different, batch[0].top_k)
        except Exception as error:  # whatever it is, those who wait must hear of it
            for piece in self._awaited(batch):
                piece.found.set_exception(error)
            return
        hits = dict(zip(different, found, strict=True))
        self.num_batches += 1
        for piece in self._awaited(batch):
            piece.found.set_result([hits[query] for query in piece.queries])

    def _awaited(self, batch: Sequence[_Piece]) -> list[_Piece]:
        """Take a batch off the count; the pieces somebody still waits for."""
        self.num_queued -= sum(len(piece.queries) for piece in batch)
        return [piece for piece in batch if not piece.found.done()]
