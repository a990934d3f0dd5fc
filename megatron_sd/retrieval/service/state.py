"""The state of one retrieval service: its corpus, its queue, what it is doing and what it has counted. No
HTTP here."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sd.errors import ConfigError
from megatron_sd.records import Hit
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.queries import fit_query
from megatron_sd.retrieval.service.metrics import ServiceMetrics
from megatron_sd.retrieval.service.search_queue import QueueFullError, SearchQueue
from megatron_sd.retrieval.service.wire import (
    QUERIES_HEADER,
    VERSION_HEADER,
    RequestError,
    RequestLimits,
    SearchOrder,
    queries_digest,
    render_reply,
)

Opener = Callable[[Callable[[str], None]], CorpusRetriever]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Where the service listens and what it accepts. token: needed unless `host` is a loopback address;
    None: nobody is asked."""

    host: str
    port: int
    token: str | None
    max_queries: int
    max_query_bytes: int
    max_top_k: int
    default_top_k: int
    max_body_bytes: int
    max_queued_queries: int
    max_batch_queries: int
    max_connections: int
    idle_timeout_s: int
    is_strict: bool = False


class RetrievalService:
    """The state of one service. `stage` says what it is doing; `corpus` and `queue` are None until it can
    search.

    Raises ConfigError for a host that others can reach without a token, and for a queue shorter than a
    request.
    """

    def __init__(self, open_corpus: Opener, settings: ServiceSettings, say: Callable[[str], None]) -> None:
        if settings.token is None and not _is_loopback(settings.host):
            raise ConfigError(
                f"host: found {settings.host!r}, which others can reach; set token_file to a file with a"
                " secret, or listen on 127.0.0.1"
            )
        if settings.max_queued_queries < settings.max_queries:
            raise ConfigError(
                f"max_queued_queries: found {settings.max_queued_queries}, expected at least max_queries"
                f" {settings.max_queries}"
            )
        self.settings = settings
        self.metrics = ServiceMetrics()
        self.stage = "starting"
        self.corpus: CorpusRetriever | None = None
        self.queue: SearchQueue | None = None
        self.failure: Exception | None = None
        self._open_corpus = open_corpus
        self._say = say

    async def run(self, stop: Callable[[], None]) -> None:
        """Open the corpus in a thread, answer a first query, then search until cancelled; `stop` is called
        when opening fails."""
        try:
            self.corpus = await asyncio.to_thread(self._open)
        except Exception as error:  # whatever it is, the server must end and say it
            self.failure = error
            stop()
            return
        limits = self.settings
        queue = SearchQueue(
            self.corpus.find, max_queued=limits.max_queued_queries, max_batch=limits.max_batch_queries
        )
        self.queue = queue
        self._progress(f"ready: {self.corpus.manifest.num_passages:,} passages by {self.corpus.method}")
        await queue.run()

    def _open(self) -> CorpusRetriever:
        corpus = self._open_corpus(self._progress)
        self._progress("answering a first query")  # which touches what a search touches
        corpus.find([corpus.passages[0].text[:200]], 1)
        return corpus

    def _progress(self, line: str) -> None:
        self.stage = line
        self._say(line)

    def info(self) -> dict[str, object]:
        """The corpus and the limits, as JSON values. Raises RequestError while there is no corpus."""
        corpus = self._ready()
        limits = self.request_limits
        return {
            "corpus_version": corpus.corpus_version,
            "num_passages": corpus.manifest.num_passages,
            "method": corpus.method,
            "rerank_depth": corpus.rerank_depth,
            "licenses": list(corpus.manifest.licenses),
            "max_queries": limits.max_queries,
            "max_query_bytes": limits.max_query_bytes,
            "max_top_k": limits.max_top_k,
        }

    @property
    def request_limits(self) -> RequestLimits:
        """The limits of one request."""
        settings = self.settings
        return RequestLimits(
            max_queries=settings.max_queries,
            max_query_bytes=settings.max_query_bytes,
            max_top_k=min(settings.max_top_k, self._ready().manifest.num_passages),
            default_top_k=settings.default_top_k,
            is_strict=settings.is_strict,
        )

    def _ready(self) -> CorpusRetriever:
        if self.corpus is None or self.queue is None:
            raise RequestError(503, f"not ready yet: {self.stage}")
        return self.corpus

    async def answer(self, order: SearchOrder) -> tuple[bytes, dict[str, str]]:
        """The reply's body and headers: an empty list for a blank query, a long query cut. Raises
        RequestError when the queue is full or there is no corpus yet."""
        corpus = self._ready()
        asked = [fit_query(query, self.settings.max_query_bytes) for query in order.queries]
        places = [place for place, query in enumerate(asked) if query.strip()]
        self.metrics.count_queries(
            num_cut=sum(len(cut) < len(query) for cut, query in zip(asked, order.queries)),
            num_blank=len(asked) - len(places),
        )
        found: list[tuple[Hit, ...]] = [()] * len(asked)
        try:
            for place, hits in zip(
                places, await self.queue.submit([asked[place] for place in places], order.top_k)
            ):
                found[place] = hits
        except QueueFullError as error:
            limit = self.settings.max_queued_queries
            raise RequestError(
                503, f"the queue of {limit} queries is full; ask again a little later"
            ) from error
        headers = {VERSION_HEADER: corpus.corpus_version, QUERIES_HEADER: queries_digest(order.queries)}
        return render_reply(found, return_scores=order.return_scores), headers


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
