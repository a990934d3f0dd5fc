"""A retriever that is a function of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import OwnCodeError, RetrievalError
from megatron_sd.own_code.loading import digest_of, load
from megatron_sd.own_code.watching import answer
from megatron_sd.records import Hit

KEY = "retriever.function"
FORM = "search(queries: list[str], top_k: int) -> of each query a list of at most top_k Hits, best first"


class OwnRetriever:
    """Calls the function with several queries at a time. A plain one is answered inline, so that rollouts
    stay a function of their seed; a coroutine function may wait. corpus_version: of the function's file.

    Raises ConfigError for a function that cannot be had or takes other arguments.
    """

    def __init__(self, name: OwnFunction, *, deadline_s: float):
        self._name = name
        self._function = load(name, KEY, FORM, num_arguments=2)
        self._deadline_s = deadline_s
        self.corpus_version = f"own-{digest_of(name, KEY)}"

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """What the function finds. Raises RetrievalError when it fails, comes back with something else, or
        not within the deadline."""
        who = f"{KEY}: {self._name}"
        try:
            found = await answer(self._function, (list(queries), top_k), who, self._deadline_s)
        except OwnCodeError as error:
            raise RetrievalError(str(error)) from error
        fault = _fault(found, len(queries), top_k)
        if fault is not None:
            raise RetrievalError(f"{who} returned {fault}, expected {FORM}")
        return [tuple(hits) for hits in found]


def _fault(found: Any, num_queries: int, top_k: int) -> str | None:
    if not isinstance(found, list | tuple) or len(found) != num_queries:
        what = f"{len(found)} lists" if isinstance(found, list | tuple) else type(found).__name__
        return f"{what} for {num_queries} queries"
    for hits in found:
        if not isinstance(hits, list | tuple) or not all(isinstance(hit, Hit) for hit in hits):
            return f"{hits!r}"[:80]
        if len(hits) > top_k:
            return f"{len(hits)} hits where {top_k} were asked for"
    return None
