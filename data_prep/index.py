"""Build a corpus directory: passages, a BM25 index, a vector index where vectors are given, and the manifest that seals them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pyarrow as pa

from data_prep.corpus import read_passages
from data_prep.table import PassageTable, is_table, new_directory, to_batches
from megatron_sd.records import Passage
from megatron_sd.retrieval.bm25 import Bm25Settings, write_bm25
from megatron_sd.retrieval.manifest import Manifest, file_entries, write_manifest
from megatron_sd.retrieval.passages import PASSAGES_NAME, PassageStore, write_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """`sd-search data index`: passages to a corpus directory. The defaults suit English text."""

    passages: str  # a passages directory (`sd-search data import`), or a jsonl file small enough for memory
    output: str
    vectors: str | None = None  # of the same passages (`sd-search data encode`): adds a vector index
    bm25: bool = True  # false: vectors only
    sources: tuple[str, ...] = ()  # of a jsonl file's passages, for the manifest; empty: the file's name
    licenses: tuple[str, ...] = ()
    stop_words: Literal["english", "none"] = "english"
    stemmer: Literal["english", "none"] = "english"
    token_pattern: str = r"(?u)\b\w\w+\b"
    k1: float = 1.5
    b: float = 0.75
    max_reject_share: float = 0.01  # more broken lines than this stop the build


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the manifest says about the passages."""

    sources: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    made_from: dict[str, str] = dataclasses.field(default_factory=dict)


def bm25_settings(config: IndexConfig) -> Bm25Settings:
    """The part of the configuration that a query must share with the index."""
    return Bm25Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Bm25Settings)})


def build_index(config: IndexConfig) -> str:
    """Read `config.passages`, write the corpus directory `config.output` and return its corpus version.

    Raises DataError for unreadable or broken passages, repeated ids, or an output that exists.
    """
    batches, labels = _read(config)
    return _write(Path(config.output), batches, labels, bm25_settings(config))


def _read(config: IndexConfig) -> tuple[Iterator[pa.RecordBatch], Labels]:
    path = Path(config.passages)
    if is_table(path):
        table = PassageTable(path)
        manifest = table.manifest
        made_from = {"passages": table.version}
        return table.batches(), Labels(sources=manifest.sources, licenses=manifest.licenses, made_from=made_from)
    output = Path(config.output)
    rejects = output.with_name(output.name + ".rejects.jsonl")
    passages = read_passages(path, rejects=rejects, max_reject_share=config.max_reject_share)
    labels = Labels(sources=config.sources or (path.name,), licenses=config.licenses)
    return to_batches(sorted(passages, key=lambda passage: passage.id)), labels


def write_corpus(output: Path, passages: Iterable[Passage], settings: Bm25Settings, labels: Labels) -> str:
    """Write a BM25 corpus directory of passages that fit in memory and return its corpus version.

    The same passages in any order give the same bytes, and a directory named `output` is always complete. Raises DataError when
    `output` exists, when there is no passage, or when an id is repeated.
    """
    return _write(output, to_batches(sorted(passages, key=lambda passage: passage.id)), labels, settings)


def _write(output: Path, batches: Iterable[pa.RecordBatch], labels: Labels, bm25: Bm25Settings) -> str:
    with new_directory(output) as partial:
        write_batches(partial / PASSAGES_NAME, batches)
        store = PassageStore(partial / PASSAGES_NAME)
        num_terms = write_bm25(partial, (f"{passage.title} {passage.text}" for passage in store), bm25)
        manifest = Manifest(
            kind="corpus",
            num_passages=len(store),
            licenses=labels.licenses,
            sources=labels.sources,
            settings={"bm25": dataclasses.asdict(bm25)},
            made_from=labels.made_from,
            versions={name: version(name) for name in ("bm25s", "numpy", "pyarrow", "PyStemmer")},
            files=file_entries(partial),
        )
        corpus_version = write_manifest(partial, manifest)
    log.info("%s: %d passages, %d terms, corpus version %s", output, len(store), num_terms, corpus_version[:16])
    return corpus_version
