"""A retriever over HTTP: the service of server.py, or any server that speaks Search-R1's `/retrieve`.

Requests run in a thread of their own with one event loop and one connection pool, so they go on while a
forward pass holds the caller's loop, and connections outlive a step. Queries that are asked at the same
time travel together; one that is being asked, or was asked before, is not asked again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from megatron_sd.config import ClientConfig
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.records import Hit
from megatron_sd.retrieval.queries import fit_query
from megatron_sd.retrieval.remote.endpoints import BreakerSettings, Endpoint, choose
from megatron_sd.retrieval.service.wire import (
    QUERIES_HEADER,
    VERSION_HEADER,
    SearchOrder,
    parse_reply,
    queries_digest,
    render_order,
)

logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
Hits = tuple[Hit, ...]
_CONTENT_TYPE = {"content-type": "application/json"}
_NOT_RETRIED = frozenset({400, 401, 403, 404, 405, 413, 422})  # the same request would be refused again


class _RefusedError(RetrievalError):
    """The server understood the request and will never serve it."""


class HttpRetriever:
    """Asks one of `endpoints`, which all serve the corpus `corpus_version`. Safe to use from several event
    loops and threads.

    A search that no endpoint answered within `client.deadline_s` raises RetrievalError with the last cause.
    """

    def __init__(self, endpoints: Sequence[str], client: ClientConfig) -> None:
        """Wait until the endpoints are ready, at most `client.ready_s`, and learn which corpus they serve.

        Raises RetrievalError when one cannot be reached, ConfigError when they serve different corpora.
        """
        breaker = BreakerSettings(max_failures=client.breaker_failures, open_s=client.breaker_open_s)
        self._client = client
        self._headers = _headers(client.token_file)
        urls = [url.rstrip("/").removesuffix("/retrieve") for url in endpoints]
        self._endpoints = [Endpoint(url, breaker, time.monotonic) for url in urls]
        self.corpus_version, self._max_query_bytes, self._max_top_k = _learn(
            self._endpoints, client, self._headers
        )
        self._turn = 0
        self._cache: OrderedDict[tuple[str, str, int], Hits] = OrderedDict()
        self._asked: dict[tuple[str, str, int], asyncio.Future[Hits]] = {}
        self._waiting: dict[int, list[str]] = defaultdict(list)  # top_k -> queries of the next requests
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retrieval client", daemon=True)
        self._thread.start()
        limits = httpx.Limits(
            max_connections=client.max_connections, max_keepalive_connections=client.max_connections
        )
        self._http = httpx.AsyncClient(
            limits=limits, headers=self._headers, trust_env=False, timeout=client.try_timeout_s
        )

    async def search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """The best `top_k` passages of each query, best first: all there are where the endpoints have
        fewer. A query longer than they take is cut. Raises RetrievalError."""
        fitting = [fit_query(query, self._max_query_bytes) for query in queries]
        search = self._search(fitting, min(top_k, self._max_top_k))
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(search, self._loop))

    def close(self) -> None:
        """End the thread and its connections."""
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        """In the client's own loop, as everything below."""
        return list(await asyncio.gather(*(self._find(query, top_k) for query in queries)))

    async def _find(self, query: str, top_k: int) -> Hits:
        key = (self.corpus_version, query, top_k)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if key not in self._asked:
            self._asked[key] = self._loop.create_future()
            if not self._waiting[top_k]:
                self._loop.call_later(self._client.gather_s, self._send, top_k)
            self._waiting[top_k].append(query)
        return await asyncio.shield(self._asked[key])

    def _send(self, top_k: int) -> None:
        """Start the requests for all queries that have gathered."""
        queries, size = self._waiting.pop(top_k, []), self._client.max_request_queries
        for start in range(0, len(queries), size):
            task = self._loop.create_task(self._serve(tuple(queries[start : start + size]), top_k))
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, queries: tuple[str, ...], top_k: int) -> None:
        """Ask for some queries and settle the futures of those who wait for them."""
        keys = [(self.corpus_version, query, top_k) for query in queries]
        try:
            found = await self._ask(SearchOrder(queries=queries, top_k=top_k, return_scores=True))
        except _RefusedError as error:
            if len(queries) > 1:  # one of them is at fault: the others must not suffer for it
                await asyncio.gather(*(self._serve((query,), top_k) for query in queries))
            else:
                self._fail(keys, error)
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._fail(keys, error)
        else:
            for key, hits in zip(keys, found, strict=True):
                self._remember(key, hits)
                self._asked.pop(key).set_result(hits)

    def _fail(self, keys: Sequence[tuple[str, str, int]], error: Exception) -> None:
        for key in keys:
            future = self._asked.pop(key)
            future.set_exception(RetrievalError(str(error)) if isinstance(error, RetrievalError) else error)
            future.exception()  # those who asked may have gone

    def _remember(self, key: tuple[str, str, int], hits: Hits) -> None:
        self._cache[key] = hits
        if len(self._cache) > self._client.cache_size:
            self._cache.popitem(last=False)

    async def _ask(self, order: SearchOrder) -> list[Hits]:
        """Try endpoints until one answers or the deadline has passed. Raises RetrievalError."""
        body = render_order(order)
        deadline = self._loop.time() + self._client.deadline_s
        cause = "every endpoint was left alone after its last failures"
        attempt = 0
        while (left_s := deadline - self._loop.time()) > 0:
            self._turn += 1
            endpoint = choose(self._endpoints, self._turn)
            if endpoint is None:
                await asyncio.sleep(min(left_s, *(endpoint.wait_s() for endpoint in self._endpoints)))
                continue
            try:
                return await self._ask_one(endpoint, order, body, left_s)
            except _RefusedError:
                raise
            except RetrievalError as error:
                cause = str(error)
            longest_s = min(self._client.max_pause_s, self._client.first_pause_s * 2**attempt)
            attempt += 1
            await asyncio.sleep(min(random.uniform(0, longest_s), max(0.0, deadline - self._loop.time())))
        raise RetrievalError(
            f"no answer to {len(order.queries)} queries within {self._client.deadline_s:g} s, {attempt}"
            f" tries; the last: {cause}"
        )

    async def _ask_one(
        self, endpoint: Endpoint, order: SearchOrder, body: bytes, left_s: float
    ) -> list[Hits]:
        """One try. Raises _RefusedError for a request that must not be repeated and RetrievalError for one
        that may."""
        endpoint.begin()
        succeeded: bool | None = None
        try:
            async with asyncio.timeout(min(left_s, self._client.try_timeout_s)):
                reply = await self._http.post(f"{endpoint.url}/retrieve", content=body, headers=_CONTENT_TYPE)
            found = self._read(reply, order)
            succeeded = True
            return found
        except _RefusedError:
            succeeded = True  # the server is well
            raise
        except RetrievalError as error:
            succeeded = False
            raise RetrievalError(f"{endpoint.url}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            succeeded = False
            raise RetrievalError(
                f"{endpoint.url}: {type(error).__name__}: {error or 'no reply in time'}"
            ) from error
        finally:
            endpoint.end(succeeded=succeeded)

    def _read(self, reply: httpx.Response, order: SearchOrder) -> list[Hits]:
        """The hits of a reply that belongs to this order and this corpus."""
        if reply.status_code in _NOT_RETRIED:
            raise _RefusedError(
                f"{reply.url} refused the request with status {reply.status_code}: {reply.text[:200]}"
            )
        if reply.status_code != httpx.codes.OK:
            raise RetrievalError(f"status {reply.status_code}: {reply.text[:200]}")
        version = reply.headers.get(VERSION_HEADER, self.corpus_version)
        if version != self.corpus_version:
            raise RetrievalError(f"serves corpus {version[:16]} now, expected {self.corpus_version[:16]}")
        digest = queries_digest(order.queries)
        if reply.headers.get(QUERIES_HEADER, digest) != digest:
            raise RetrievalError("answered other queries than were asked")
        return parse_reply(reply.content, num_queries=len(order.queries), top_k=order.top_k)


def _headers(token_file: str | None) -> dict[str, str]:
    return {} if token_file is None else {"authorization": f"Bearer {read_token(token_file)}"}


def read_token(path: str) -> str:
    """The secret in a file. Raises DataError when there is none."""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"token_file: cannot read {path} ({error}); expected a file with a secret on one line"
        ) from error
    if not token or not token.isascii() or not token.isprintable():
        raise DataError(f"token_file: {path} holds no usable secret; expected one line of printable ASCII")
    return token


def _learn(
    endpoints: Sequence[Endpoint], client: ClientConfig, headers: dict[str, str]
) -> tuple[str, int, int]:
    """The corpus version all endpoints serve, and the longest query (bytes) and most passages that all of
    them take."""
    with httpx.Client(headers=headers, trust_env=False, timeout=client.try_timeout_s) as http:
        infos = {endpoint.url: _info(http, endpoint.url, client) for endpoint in endpoints}
    if len({info["corpus_version"] for info in infos.values()}) != 1:
        served = ", ".join(f"{url} {str(info['corpus_version'])[:16]}" for url, info in infos.items())
        raise ConfigError(
            f"retriever.endpoints: found different corpora ({served}), expected one; or set"
            " retriever.sharded, if these are its shards"
        )
    longest, most = (
        min(int(info.get(key, 1 << 30)) for info in infos.values())
        for key in ("max_query_bytes", "max_top_k")
    )
    return str(next(iter(infos.values()))["corpus_version"]), longest, most


def _info(http: httpx.Client, url: str, client: ClientConfig) -> dict[str, Any]:
    """Ask `/info` until the server is ready."""
    deadline = time.monotonic() + client.ready_s
    while True:
        try:
            reply = http.get(f"{url}/info")
            if reply.status_code == httpx.codes.OK:
                info = reply.json()
                return info | {"corpus_version": info["corpus_version"]}
            cause = f"status {reply.status_code}: {reply.text[:200]}"
            if reply.status_code in _NOT_RETRIED:
                break
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            cause = f"{type(error).__name__}: {error}"
        if time.monotonic() >= deadline:
            break
        time.sleep(client.first_pause_s)
    if client.corpus_version is not None and cause.startswith("status 404"):
        return {"corpus_version": client.corpus_version}
    raise RetrievalError(
        f"{url}/info gave no corpus version within {client.ready_s:g} s ({cause}); start `sd-search retriever"
        " serve` there, or, for another server with Search-R1's /retrieve, name its corpus in"
        " retriever.client.corpus_version"
    )
