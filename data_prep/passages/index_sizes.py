"""`sd-search data plan`: what each index of a corpus of some size needs, from figures measured on a small
one.

Memory and disk follow from the formats. Speeds are scaled from one x86 core, 200,000 passages, 384
dimensions, top 3, batches of 64 (docs/retrieval.md): they say which choices are out of the question, not
what a machine will do to the last query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.vectors.vector_index import VectorIndexConfig, factory_string, num_codes
from megatron_sd.errors import ConfigError
from megatron_sd.retrieval.corpus.faiss_index import FaissKind

MEASURED_PASSAGES, MEASURED_DIM = 200_000, 384
ARROW_BYTES_PER_WORD, BM25_BYTES_PER_WORD, PARQUET_BYTES_PER_WORD = 6.6, 7.4, 3.1
GRAPH_BYTES = 272  # HNSW32: 64 links of 4 bytes, and the level
LIST_ID_BYTES = 8  # IVF keeps the row of every code


@dataclass(frozen=True, kw_only=True)
class IndexSizesConfig:
    """The corpus and the machine."""

    passages: float  # how many
    dim: int = 768  # numbers of a vector
    words_per_passage: int = 100  # for BM25
    cores: int = 16  # that build and search
    # passages a second over all devices; measure yours on one shard of `sd-search data encode`
    encoded_per_s: float = 1000.0


@dataclass(frozen=True, kw_only=True)
class IndexEstimate:
    """One choice of index. ram_gb: what has to stay in the page cache for searches at this speed; qps:
    queries a second."""

    name: str
    index: str
    ram_gb: float
    build_hours: float
    qps: float
    remark: str


def _coded_bytes(dim: int) -> float:
    return num_codes(dim) / 2 + LIST_ID_BYTES + dim


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """qps: of one core; build_core_s: core seconds to build; both at MEASURED_PASSAGES x MEASURED_DIM."""

    kind: FaissKind
    bytes_per_vector: Callable[[int], float]
    qps: float
    build_core_s: float
    recall: float  # at 3


_MEASURED = (
    _Measured(kind="flat", bytes_per_vector=lambda d: 4 * d, qps=83, build_core_s=0.2, recall=1.0),
    _Measured(kind="fp16", bytes_per_vector=lambda d: 2 * d, qps=193, build_core_s=0.5, recall=0.9997),
    _Measured(kind="sq8", bytes_per_vector=lambda d: d, qps=188, build_core_s=0.5, recall=0.989),
    _Measured(
        kind="hnsw", bytes_per_vector=lambda d: 4 * d + GRAPH_BYTES, qps=4218, build_core_s=400, recall=0.965
    ),
    _Measured(
        kind="hnsw_sq8", bytes_per_vector=lambda d: d + GRAPH_BYTES, qps=4103, build_core_s=450, recall=0.953
    ),
    _Measured(kind="ivf_pq", bytes_per_vector=_coded_bytes, qps=10_000, build_core_s=200, recall=0.85),
)
_BM25_QPS, _BM25_BUILD_CORE_S = 9700, 45


def _slower(kind: FaissKind, n: float, d: float) -> float:
    """By what factor a search slows with n times the vectors of d times the dimensions.

    A graph's path grows with the logarithm of N; 64 of 4 sqrt(N) lists hold 16 sqrt(N) vectors; the others
    look at all.
    """
    if kind.startswith("hnsw"):
        return d * _depth(n)
    return d * (math.sqrt(n) if kind == "ivf_pq" else n)


def _depth(n: float) -> float:
    """log N over the logarithm of the measured N."""
    return math.log(max(2.0, n * MEASURED_PASSAGES)) / math.log(MEASURED_PASSAGES)


def _words(config: IndexSizesConfig) -> float:
    return config.passages * config.words_per_passage


def text_gb(config: IndexSizesConfig) -> float:
    """Of the passages as they are mapped; every estimate's memory includes it."""
    return _words(config) * ARROW_BYTES_PER_WORD / 1e9


def passages_gb(config: IndexSizesConfig) -> float:
    """Of the passages directory on disk."""
    return _words(config) * PARQUET_BYTES_PER_WORD / 1e9


def vectors_gb(config: IndexSizesConfig) -> float:
    """Of the vectors directory on disk: float16."""
    return config.passages * config.dim * 2 / 1e9


def estimates(config: IndexSizesConfig) -> list[IndexEstimate]:
    """One estimate for each choice. Raises ConfigError for a corpus or machine that cannot be."""
    for name in ("passages", "dim", "words_per_passage", "cores", "encoded_per_s"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name}: found {getattr(config, name)!r}, expected more than 0")
    n, d = config.passages / MEASURED_PASSAGES, config.dim / MEASURED_DIM
    in_memory_gb = text_gb(config)
    words = config.words_per_passage / 100
    bm25 = IndexEstimate(
        name="bm25",
        index="postings",
        ram_gb=in_memory_gb + _words(config) * BM25_BYTES_PER_WORD / 1e9,
        build_hours=_BM25_BUILD_CORE_S * n * words / 3600,
        qps=config.cores * _BM25_QPS / (n * words),
        remark="no encoder",
    )
    return [bm25, *(_dense(measured, config, (n, d), in_memory_gb) for measured in _MEASURED)]


def _dense(
    measured: _Measured, config: IndexSizesConfig, growth: tuple[float, float], in_memory_gb: float
) -> IndexEstimate:
    n, d = growth
    build_s = (
        measured.build_core_s
        * n
        * d
        * (_depth(n) if measured.kind.startswith("hnsw") else 1.0)
        / config.cores
    )
    return IndexEstimate(
        name=measured.kind,
        index=factory_string(VectorIndexConfig(kind=measured.kind), int(config.passages), config.dim),
        ram_gb=in_memory_gb + config.passages * measured.bytes_per_vector(config.dim) / 1e9,
        build_hours=build_s / 3600,
        qps=config.cores * measured.qps / _slower(measured.kind, n, d),
        remark=f"recall@3 {measured.recall:g} as measured",
    )


def render_plan(config: IndexSizesConfig, found: Sequence[IndexEstimate]) -> str:
    """The table, and what it rests on."""
    head = f"{'index':<10}{'FAISS name':<34}{'RAM, disk GB':>13}{'build h':>10}{'queries/s':>12}   remark"
    rows = [
        f"{e.name:<10}{e.index:<34}{e.ram_gb:>13,.1f}{e.build_hours:>10,.2f}{e.qps:>12,.0f}   {e.remark}"
        for e in found
    ]
    encoding = config.passages / config.encoded_per_s / 3600
    return "\n".join(
        [
            (
                f"{config.passages:,.0f} passages of {config.words_per_passage} words, {config.dim}"
                f" dimensions, {config.cores} cores"
            ),
            "",
            head,
            *rows,
            "",
            (
                f"passages directory {passages_gb(config):,.1f} GB; float16 vectors before"
                f" indexing {vectors_gb(config):,.1f} GB, {encoding:,.1f} h at"
                f" {config.encoded_per_s:,.0f} passages/s"
            ),
            (
                "RAM includes the passages; all is memory-mapped, so less RAM works and is slower. Speeds are"
                " scaled from"
            ),
            (
                f"one core at {MEASURED_PASSAGES:,} x {MEASURED_DIM}, the search alone: a query encoder comes"
                " on top."
            ),
        ]
    )
