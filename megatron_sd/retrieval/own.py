"""A retriever that is a function of the user's own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError, OwnCodeError, RetrievalError
from megatron_sd.own_code import digest_of, load, within_limits
from megatron_sd.records import Hit

KEY = "retriever.function"
FORM = "search(queries: list[str], top_k: int) -> of each query a list of at most top_k Hits, best first"


class OwnRetriever:
    """Calls the function with several queries at a time. A plain one is answered inline, so that rollouts stay
    a function of their seed; a coroutine function may wait. corpus_version: of the function's file.

    Raises ConfigError for a function that cannot be had or takes other arguments.
    """

    def __init__(self, name: OwnFunction, *, deadline_s: float):
        self._name = name
        self._function = load(name, KEY)
        self._deadline_s = deadline_s
        self.corpus_version = f"own-{digest_of(name, KEY)}"
        try:
            inspect.signature(self._function).bind(["a query"], 1)
        except TypeError as error:
            raise ConfigError(f"{KEY}: {name} cannot be called so ({error}), expected {FORM}") from error

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """What the function finds. Raises RetrievalError when it fails, comes back with something else, or not
        within the deadline."""
        try:
            found = await asyncio.wait_for(self._found(list(queries), top_k), self._deadline_s)
        except OwnCodeError as error:
            raise RetrievalError(str(error)) from error
        except TimeoutError as error:
            raise RetrievalError(
                f"{KEY}: {self._name} has not returned after {self._deadline_s:g} s (retriever.client.deadline_s)"
            ) from error
        except Exception as error:
            raise RetrievalError(f"{KEY}: {self._name} raised {type(error).__name__}: {error}") from error
        fault = _fault(found, len(queries), top_k)
        if fault is not None:
            raise RetrievalError(f"{KEY}: {self._name} returned {fault}, expected {FORM}")
        return [tuple(hits) for hits in found]

    async def _found(self, queries: list[str], top_k: int) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(queries, top_k)
        return within_limits(lambda: self._function(queries, top_k), f"{KEY}: {self._name}", self._deadline_s)


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
