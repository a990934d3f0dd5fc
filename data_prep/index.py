"""Build a corpus directory: passages, their BM25 index, and the manifest that seals them."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from data_prep.corpus import read_passages
from megatron_sd.errors import DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.bm25 import BM25_FILES, Bm25Settings, write_bm25
from megatron_sd.retrieval.manifest import Manifest, file_entry, write_manifest
from megatron_sd.retrieval.passages import PASSAGES_NAME, PassageStore, write_passages

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """`sd-search data index`: passages (jsonl, .gz or .zst) to a corpus directory. The defaults suit English text."""

    passages: str
    output: str
    licenses: tuple[str, ...] = ()  # of the passages, for the manifest
    stop_words: Literal["english", "none"] = "english"
    stemmer: Literal["english", "none"] = "english"
    token_pattern: str = r"(?u)\b\w\w+\b"
    k1: float = 1.5
    b: float = 0.75
    max_reject_share: float = 0.01  # more broken lines than this stop the build


def bm25_settings(config: IndexConfig) -> Bm25Settings:
    """The part of the configuration that a query must share with the index."""
    return Bm25Settings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Bm25Settings)})


def build_index(config: IndexConfig) -> str:
    """Read `config.passages`, write the corpus directory `config.output` and return its corpus version.

    Raises DataError for unreadable or broken passages, repeated ids, or an output that exists.
    """
    output = Path(config.output)
    rejects = output.with_name(output.name + ".rejects.jsonl")
    passages = read_passages(Path(config.passages), rejects=rejects, max_reject_share=config.max_reject_share)
    source = Path(config.passages).name
    return write_corpus(output, passages, bm25_settings(config), sources=(source,), licenses=config.licenses)


def write_corpus(
    output: Path, passages: Iterable[Passage], settings: Bm25Settings, *, sources: tuple[str, ...], licenses: tuple[str, ...]
) -> str:
    """Write a corpus directory and return its corpus version. The same passages in any order give the same bytes.

    Everything is written under a temporary name and renamed at the end: a directory named `output` is always complete.
    Raises DataError when `output` exists, when there is no passage, or when an id is repeated.
    """
    if output.exists():
        raise DataError(f"{output} exists: remove it or choose another output; a corpus directory is never changed in place")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_passages(partial / PASSAGES_NAME, sorted(passages, key=lambda passage: passage.id))
    store = PassageStore(partial / PASSAGES_NAME)
    num_terms = write_bm25(partial, (f"{passage.title} {passage.text}" for passage in store), settings)
    manifest = Manifest(
        num_passages=len(store),
        num_terms=num_terms,
        licenses=licenses,
        sources=sources,
        settings=dataclasses.asdict(settings),
        versions={name: version(name) for name in ("bm25s", "numpy", "pyarrow", "PyStemmer")},
        files={name: file_entry(partial / name) for name in (PASSAGES_NAME, *BM25_FILES)},
    )
    corpus_version = write_manifest(partial, manifest)
    partial.rename(output)
    log.info("%s: %d passages, %d terms, corpus version %s", output, len(store), num_terms, corpus_version[:16])
    return corpus_version
