"""Where passages come from, and how they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sd.config.own_function import OwnFunction


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """A cross-encoder that reads the first passages of a search again and puts them into its own order
    (retrieval/reranker.py)."""

    model: str  # a local directory: a classifier of query and passage, with one score or two classes
    depth: int = 50  # passages of a query that it reads
    passage_format: str = "{title}\n{text}"  # what it reads of a passage; fields: {title} {text}
    max_tokens: int = 512  # of query and passage together; what is longer is cut
    batch_size: int = 32  # pairs read together
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of its weights


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a corpus directory is searched, in a run's own process or by `sd-search retriever serve`."""

    # auto: dense where the corpus has vectors, else bm25
    method: Literal["auto", "bm25", "dense", "hybrid"] = "auto"
    effort: int | None = None  # HNSW's efSearch, IVF's nprobe; None: as the index was built for
    # Of the query encoder, and of the vectors where FAISS has GPU code. In a training rank: its own GPU;
    # vectors only with cuda.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fusion_depth: int = 100  # hybrid: how many passages of each method are ranked together
    fusion_constant: int = 60  # hybrid: a passage at rank r counts 1 / (constant + r)
    rerank: RerankConfig | None = None  # on `device`, after any method


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How endpoints are asked. A search that fails for good makes its rollout `retrieval_failed`: no data,
    and counted."""

    deadline_s: float = 60.0  # of one search, retries included
    try_timeout_s: float = 20.0  # of one try
    ready_s: float = 600.0  # how long the start of a run waits for a server that is still loading
    first_pause_s: float = 0.2  # pauses between tries are drawn from [0, p), p doubling from here
    max_pause_s: float = 5.0  # the longest p
    gather_s: float = 0.002  # queries asked within this time travel together
    max_request_queries: int = 64  # of one request
    max_connections: int = 16  # to an endpoint
    breaker_failures: int = 5  # in a row: the endpoint is left alone
    breaker_open_s: float = 10.0  # how long, before it is probed
    cache_size: int = 100_000  # searches whose passages are remembered
    token_file: str | None = None  # a file with the server's secret
    corpus_version: str | None = None  # a name for the corpus of servers that have no /info


@dataclass(frozen=True, kw_only=True)
class QdrantConfig:
    """A Qdrant collection that `sd-search data upload` filled."""

    url: str  # of the server
    collection: str  # in it
    # the vectors directory it was filled from: its encoder reads the queries, its version is the corpus
    # version
    vectors: str
    deadline_s: float = 60.0  # of one search; whole seconds, rounded up
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the query encoder
    token_file: str | None = None  # a file with the server's API key


@dataclass(frozen=True, kw_only=True)
class OpenSearchConfig:
    """An OpenSearch index that `sd-search data upload` filled, searched by BM25 (bm25) or by vectors
    (knn)."""

    url: str  # of the server
    index: str  # in it
    # for knn: the vectors directory it was filled from, whose encoder reads the queries
    vectors: str | None = None
    method: Literal["bm25", "knn"] = "bm25"  # over words, or over vectors
    k1: float = 1.5  # of BM25, for upload
    b: float = 0.75  # of BM25, for upload
    deadline_s: float = 60.0  # of one search, retries included
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the query encoder
    login_file: str | None = None  # a file with USER:PASSWORD
    ca_file: str | None = None  # certificates to believe an https server by; None: the public ones


@dataclass(frozen=True, kw_only=True)
class WebSearchConfig:
    """A search engine of the web, and the file that remembers what it found (retrieval/remote/web_search.py)."""

    engine: Literal["serper", "searxng"]  # whose requests and replies
    store: str  # a JSONL file: what was found, each query once
    # replay: from the store alone, no network; record: what the store does not hold is asked for and added
    mode: Literal["replay", "record"] = "replay"
    url: str | None = None  # of a SearXNG instance that serves JSON; None: Serper's own
    token_file: str | None = None  # a file with the API key
    num_results: int = 10  # asked for and kept of every query; at least top_k
    # searches that the store may hold when another is to be asked for: of all ranks and restarts together
    max_calls: int = 1000
    # results from there or below are left out, as pages that hold a benchmark's answers
    blocked_domains: tuple[str, ...] = ()
    deadline_s: float = 60.0  # of one search, retries included
    try_timeout_s: float = 15.0  # of one try
    max_connections: int = 4  # at one time, of a rank


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """Where passages come from: a corpus directory (`sd-search data index`) in this process, running
    servers, Qdrant, OpenSearch, a search engine of the web, or a function of your own."""

    corpus: str | None = None  # a corpus directory, opened in this process
    endpoints: tuple[str, ...] = ()  # http://host:port of servers of one corpus, which share the load
    sharded: bool = False  # the endpoints serve different parts of one corpus; each search asks all of them
    qdrant: QdrantConfig | None = None
    opensearch: OpenSearchConfig | None = None
    web: WebSearchConfig | None = None
    # your own: search(queries, top_k) -> of each query at most top_k Hits, best first; client.deadline_s holds
    function: OwnFunction | None = None
    top_k: int = 3  # passages that a search shows
    search: SearchConfig = field(default_factory=SearchConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
