"""Build a corpus directory: passages, a BM25 index, a vector index where vectors are given, and the
manifest that seals them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import faiss
import pyarrow as pa

from data_prep.passages.corpus import read_passages
from data_prep.passages.sourced import to_batches
from data_prep.passages.table import PassageTable, is_table
from data_prep.vectors.vector_index import (
    VectorIndexConfig,
    check_trainable,
    vector_index_settings,
    write_vector_index,
)
from data_prep.vectors.vectors import VectorShards
from megatron_sd.durable.files import whole_file
from megatron_sd.durable.resumable import Plan, new_directory, whole_part
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.bm25 import BM25_DIRECTORY, Analyzer, Bm25Settings, write_bm25
from megatron_sd.retrieval.corpus.faiss_index import DENSE_DIRECTORY
from megatron_sd.retrieval.corpus.manifest import Manifest, file_entries, write_manifest
from megatron_sd.retrieval.corpus.passages import PASSAGES_NAME, PassageStore, write_batches

log = logging.getLogger(__name__)

_FINISHED = (PASSAGES_NAME, BM25_DIRECTORY, DENSE_DIRECTORY)  # the parts of a corpus


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """`sd-search data index`: passages to a corpus directory. The defaults suit English text."""

    passages: str  # a passages directory (`sd-search data import`), or a jsonl file small enough for memory
    output: str  # a corpus directory
    vectors: str | None = None  # of the same passages (`sd-search data encode`): adds a vector index
    vector_index: VectorIndexConfig = field(default_factory=VectorIndexConfig)
    # a questions file: report the vector index's recall against exact search on its questions
    recall: str | None = None
    recall_questions: int = 200  # how many of them
    recall_top_k: int = 10  # passages that are compared
    bm25: bool = True  # false: the vector index alone
    sources: tuple[str, ...] = ()  # of a jsonl file's passages, for the manifest; empty: the file's name
    licenses: tuple[str, ...] = ()  # as sources
    stop_words: Literal["english", "none"] = "english"  # of BM25, as the next five
    stemmer: Literal["english", "none"] = "english"  # of words
    token_pattern: str = r"(?u)\b\w\w+\b"  # what a word is
    k1: float = 1.5  # how soon a repeated word counts no more
    b: float = 0.75  # how much a passage's length counts
    max_reject_share: float = 0.01  # more broken lines than this stop the build


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the manifest says about the passages."""

    sources: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    made_from: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is built besides the passages."""

    bm25: Bm25Settings | None
    vectors: VectorShards | None
    vector_index: VectorIndexConfig


def bm25_settings(config: IndexConfig) -> Bm25Settings:
    """The part of the configuration that a query must share with the index."""
    return Bm25Settings(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(Bm25Settings)}
    )


def build_index(config: IndexConfig) -> str:
    """Read `config.passages`, write the corpus directory `config.output` and return its corpus version.

    Raises DataError for unreadable or broken passages, repeated ids, or an output that exists.
    """
    if config.vectors is None and not config.bm25:
        raise ConfigError(
            "bm25: found false without vectors, expected one of the two: a corpus needs an index"
        )
    Analyzer(bm25_settings(config))  # a bad token_pattern is said before the passages are read
    batches, labels = _read(config)
    vectors = None if config.vectors is None else _vectors(Path(config.vectors), labels)
    if vectors is not None:
        check_trainable(len(vectors), config.vector_index)
    parts = Parts(
        bm25=bm25_settings(config) if config.bm25 else None, vectors=vectors, vector_index=config.vector_index
    )
    corpus_version = _write(Path(config.output), batches, labels, parts)
    if vectors is not None and config.recall is not None:
        _report_recall(config, vectors, config.recall)
    return corpus_version


def _report_recall(config: IndexConfig, vectors: VectorShards, questions: str) -> None:
    from data_prep.vectors.vector_recall import measure_recall  # imports torch

    limit, top_k = config.recall_questions, config.recall_top_k
    found = measure_recall(Path(config.output), vectors, questions, limit=limit, top_k=top_k)
    log.info("recall@%d of the vector index against exact search: %.4f", top_k, found)


def _vectors(directory: Path, labels: Labels) -> VectorShards:
    vectors = VectorShards(directory)
    of = vectors.manifest.made_from["passages"]
    if of != labels.made_from.get("passages"):
        found = labels.made_from.get("passages", "no passages directory (`sd-search data import` makes one)")
        raise DataError(
            f"{directory} holds vectors of the passages {of}, found {found}: encode the passages that are"
            " indexed"
        )
    labels.made_from["vectors"] = vectors.version
    return vectors


def _read(config: IndexConfig) -> tuple[Iterator[pa.RecordBatch], Labels]:
    path = Path(config.passages)
    if is_table(path):
        table = PassageTable(path)
        manifest = table.manifest
        made_from = {"passages": table.version}
        return table.batches(), Labels(
            sources=manifest.sources, licenses=manifest.licenses, made_from=made_from
        )
    output = Path(config.output)
    rejects = output.with_name(output.name + ".rejects.jsonl")
    passages = read_passages(path, rejects=rejects, max_reject_share=config.max_reject_share)
    labels = Labels(sources=config.sources or (path.name,), licenses=config.licenses)
    return to_batches(sorted(passages, key=lambda passage: passage.id)), labels


def write_corpus(output: Path, passages: Iterable[Passage], settings: Bm25Settings, labels: Labels) -> str:
    """Write a BM25 corpus directory of passages that fit in memory and return its corpus version.

    The same passages in any order give the same bytes, and a directory named `output` is always complete.
    Raises DataError when `output` exists, when there is no passage, or when an id is repeated.
    """
    batches = to_batches(sorted(passages, key=lambda passage: passage.id))
    return _write(
        output, batches, labels, Parts(bm25=settings, vectors=None, vector_index=VectorIndexConfig())
    )


def _write(output: Path, batches: Iterable[pa.RecordBatch], labels: Labels, parts: Parts) -> str:
    """Each of the three parts appears when it is whole. A build from a passages directory goes on after
    those that are."""
    used = {name: version(name) for name in ("bm25s", "numpy", "pyarrow", "PyStemmer")} | {
        "faiss": faiss.__version__
    }
    settings: dict[str, object] = {}
    with new_directory(output, _plan(labels, parts, used)) as partial:
        if not (partial / PASSAGES_NAME).exists():
            with whole_file(partial / PASSAGES_NAME) as path:
                write_batches(path, batches)
        store = PassageStore(partial / PASSAGES_NAME)
        if parts.bm25 is not None:
            settings["bm25"] = dataclasses.asdict(parts.bm25)
            if not (partial / BM25_DIRECTORY).exists():
                with whole_part(partial, BM25_DIRECTORY) as building:
                    num_terms = write_bm25(
                        building, (f"{passage.title} {passage.text}" for passage in store), parts.bm25
                    )
                log.info("BM25: %d terms", num_terms)
        if parts.vectors is not None:
            settings["dense"] = vector_index_settings(parts.vectors, parts.vector_index)
            if not (partial / DENSE_DIRECTORY).exists():
                with whole_part(partial, DENSE_DIRECTORY) as building:
                    write_vector_index(building, parts.vectors, parts.vector_index)
        manifest = Manifest(
            kind="corpus",
            num_passages=len(store),
            licenses=labels.licenses,
            sources=labels.sources,
            settings=settings,
            made_from=labels.made_from,
            versions=used,
            files={
                name: entry for name, entry in file_entries(partial).items() if name.startswith(_FINISHED)
            },
        )
        corpus_version = write_manifest(partial, manifest)
    log.info("%s: %d passages, corpus version %s", output, len(store), corpus_version[:16])
    return corpus_version


def _plan(labels: Labels, parts: Parts, used: dict[str, str]) -> Plan | None:
    """None for passages that fit in memory: they are read again."""
    if "passages" not in labels.made_from:
        return None
    bm25 = None if parts.bm25 is None else dataclasses.asdict(parts.bm25)
    dense = None if parts.vectors is None else dataclasses.asdict(parts.vector_index)
    return Plan(
        begun_from=labels.made_from | {"bm25": bm25, "vector_index": dense, "versions": used},
        finished=_FINISHED,
    )
