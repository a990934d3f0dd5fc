"""Searches of the web, recorded and replayed.

A run that records asks the engine for what its store does not hold yet, and adds the answers. One that replays
reads the store alone: no network, the same passages every time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from megatron_sd.config import WebSearchConfig
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.remote.client import read_token
from megatron_sd.retrieval.remote.web_engines import WEB_ENGINES, EngineBusyError, read_passages
from megatron_sd.retrieval.remote.web_store import WebStore

_RETRIED = (429, 500, 502, 503, 504)
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 8.0
_HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*")
Passages = tuple[Passage, ...]


class _RefusedError(RetrievalError):
    """The engine would answer the same again."""


class WebSearchRetriever:
    """Searches the web, or a store of what it found. A passage is a result: its address is the id, and its
    score 1 / place. `corpus_version` is a hash of the settings, and of the store where it is replayed.

    Raises ConfigError for an engine without its address or key, for fewer results than top_k and for a domain that
    is none; DataError for a store that cannot be read.
    """

    def __init__(self, config: WebSearchConfig, *, top_k: int):
        if config.num_results < top_k:
            raise ConfigError(
                f"retriever.web.num_results: found {config.num_results}, expected at least retriever.top_k, {top_k}"
            )
        self._config = config
        self._engine = WEB_ENGINES[config.engine]
        self._url = config.url or self._engine.url or ""
        self._records = config.mode == "record"
        if not self._url:
            raise ConfigError(f"retriever.web.url: found none, expected where {config.engine} is")
        if self._records and self._engine.needs_key and config.token_file is None:
            raise ConfigError(
                f"retriever.web.token_file: found none, expected a file with the key of {config.engine}"
            )
        self._key = "" if config.token_file is None or not self._records else read_token(config.token_file)
        made_by = {"engine": config.engine, "url": self._url, "num_results": config.num_results}
        self._store = WebStore(Path(config.store), made_by, may_add=self._records)
        told = [made_by, sorted(config.blocked_domains), "" if self._records else self._store.digest()]
        self.corpus_version = f"web-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}"
        self._lock = threading.Lock()  # of the store and of what is being asked
        self._asked: dict[str, Future[Passages]] = {}
        self._num_asking = 0
        self._blocked = tuple(map(_host, config.blocked_domains))
        self._threads = ThreadPoolExecutor(config.max_connections, thread_name_prefix="web search")
        self._http = httpx.Client(timeout=config.try_timeout_s)  # through the environment's proxies, if any

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` results of each query, those of blocked domains left out; what the store holds comes
        without waiting. Raises RetrievalError for an engine that does not answer, and beyond the budget;
        DataError for a query that is not in a store that is replayed."""
        # a lone surrogate, which no file and no request can hold, becomes a question mark
        texts = [query.encode("utf-8", errors="replace").decode() for query in queries]
        found = await asyncio.gather(*(self._find(text) for text in texts))
        return [self._hits(passages, top_k) for passages in found]

    async def _find(self, query: str) -> Passages:
        with self._lock:
            known = self._store.find(query)
            if known is not None:
                return known
            if not self._records:
                raise DataError(
                    f"retriever.web.store: {self._config.store} holds no search for {query!r}; expected every query"
                    " of a replayed run in it: record them first (retriever.web.mode record), with the same model,"
                    " questions and seed"
                )
            if query not in self._asked:
                self._asked[query] = self._threads.submit(self._ask_and_keep, query)
            future = self._asked[query]
        # who gives up waiting must not end the search of others
        return await asyncio.shield(asyncio.wrap_future(future))

    def _ask_and_keep(self, query: str) -> Passages:
        try:
            self._take_of_budget()
            try:
                passages = self._ask(query)
            except BaseException:
                with self._lock:
                    self._num_asking -= 1
                raise
            with self._lock:  # one step: the budget knows of this search all the time
                self._num_asking -= 1
                return self._store.keep(query, passages)
        finally:
            with self._lock:
                del self._asked[query]

    def _take_of_budget(self) -> None:
        with self._lock:
            self._store.refresh()  # other processes have the same budget
            spent = len(self._store)
            if spent + self._num_asking >= self._config.max_calls:
                raise RetrievalError(
                    f"retriever.web.max_calls: {self._config.store} holds {spent} searches and {self._num_asking} are"
                    f" being made, which is the budget of {self._config.max_calls}: raise it, or replay what there is"
                )
            self._num_asking += 1

    def _ask(self, query: str) -> list[Passage]:
        """From the engine, tried again until the deadline. Raises RetrievalError."""
        deadline, attempt = time.monotonic() + self._config.deadline_s, 0
        while True:
            attempt += 1
            try:
                return self._try(query)
            except _RefusedError:
                raise
            except RetrievalError as error:
                pause_s = random.uniform(0, min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
                if time.monotonic() + pause_s > deadline:
                    raise RetrievalError(f"{error} ({attempt} tries)") from error
            time.sleep(pause_s)

    def _try(self, query: str) -> list[Passage]:
        """Raises _RefusedError for what would be answered so again, RetrievalError for what may not."""
        order = self._engine.request(self._url, query, self._config, self._key)
        method = "GET" if order.body is None else "POST"
        try:
            reply = self._http.request(
                method, order.url, headers=order.headers, params=order.parameters, json=order.body
            )
        except httpx.HTTPError as error:
            raise RetrievalError(
                f"retriever.web: {self._url}: {type(error).__name__}: {error or 'no reply in time'}"
            ) from error
        if reply.status_code != httpx.codes.OK:
            refused = RetrievalError if reply.status_code in _RETRIED else _RefusedError
            raise refused(f"retriever.web: {self._url}: status {reply.status_code}: {reply.text[:200]}")
        try:
            return read_passages(reply.json(), self._engine, self._config.num_results)
        except EngineBusyError as error:
            raise RetrievalError(f"retriever.web: {self._url}: {error}") from error
        except ValueError as error:
            raise _RefusedError(f"retriever.web: {self._url}: {error}") from error

    def _hits(self, passages: Passages, top_k: int) -> tuple[Hit, ...]:
        """Blocked here and not before: a store can be replayed with other domains."""
        allowed = [passage for passage in passages if not is_blocked(passage.id, self._blocked)]
        return tuple(
            Hit(passage=passage, score=1.0 / place) for place, passage in enumerate(allowed[:top_k], start=1)
        )


def is_blocked(url: str, domains: Sequence[str]) -> bool:
    """True for an address of one of the domains or below it, and, where some are blocked, for an address of
    which nobody can say. domains: as _host gives them."""
    if not domains:
        return False
    try:
        host = _ascii(urlsplit(url).hostname or "")
    except ValueError:
        return True
    return not host or any(host == name or host.endswith(f".{name}") for name in domains)


def _host(domain: str) -> str:
    """A blocked domain as it is compared. Raises ConfigError for an address, a pattern or anything else that would
    block nothing."""
    try:
        host = _ascii(domain)
    except ValueError:
        host = ""
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"retriever.web.blocked_domains: found {domain!r}, expected a bare domain such as huggingface.co, which"
            " stands for all below it: no https://, no path, no port, no *"
        )
    return host


def _ascii(host: str) -> str:
    """Lower case, without a dot at its ends, other letters in IDNA's spelling. Raises ValueError."""
    return host.strip().strip(".").lower().encode("idna").decode()
