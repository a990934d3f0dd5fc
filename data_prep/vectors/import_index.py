"""The vectors of a FAISS index that others built, such as Search-R1's e5_Flat.index, as a vectors
directory: nothing is encoded again but a few passages, by which it is seen that index, passages and encoder
belong together.

Rows of the index are in the order of the file it was built from; a passages directory is in id order. Which
row is whose follows from that file (`order`), or, without it, from ids that are row numbers, as those of
wiki-18 are.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import faiss
import numpy as np

from data_prep.passages.sourced import SourcedPassage, from_batch
from data_prep.passages.table import PassageTable
from data_prep.sources.jsonl import RowError
from data_prep.sources.passage_rows import parse_passage
from data_prep.sources.rows import read_rows
from data_prep.vectors.encode import (
    EncodeConfig,
    begin_vectors,
    check_config,
    encoder_settings,
    format_passage,
    passage_encoder,
    seal_vectors,
    write_shard,
)
from megatron_sd.durable.resumable import check_absent, locked, partial_of
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.encoder import Encoder, choose_device
from megatron_sd.retrieval.corpus.manifest import file_entry

log = logging.getLogger(__name__)

# between a vector of the index and the same passage encoded here; half precision alone costs 1e-5
_LEAST_COSINE = 0.99
_IDS_AT_A_TIME = 1 << 20
_KINDS = ("IndexFlat", "IndexFlatIP", "IndexHNSWFlat")  # which hold the vectors as they were


@dataclass(frozen=True, kw_only=True)
class ImportIndexConfig(EncodeConfig):
    """`sd-search data import-index`: a flat (or HNSW of flat) inner-product index to a vectors directory.
    The options of `encode` say how its vectors were made; for E5: query_prefix "query: ", passage_format
    "passage: {contents}"."""

    index: str  # memory-mapped; copied shard by shard
    # the passages file whose rows the index has, in order; None: passage ids are row numbers from 0
    order: str | None = None
    checked_passages: int = 16  # encoded and compared, evenly over the directory


def import_index(config: ImportIndexConfig) -> str:
    """Write the vectors and return the version of their directory. Killed and started again it goes on
    after its whole shards.

    Raises DataError when counts, dimensions or vectors do not fit the passages and the encoder.
    """
    output, path = Path(config.output), Path(config.index)
    check_absent(output)
    check_config(config)
    if config.checked_passages < 1:
        raise ConfigError(f"checked_passages: found {config.checked_passages}, expected at least 1")
    table = PassageTable(Path(config.passages))
    index = _open(path)
    rows = _Rows(table, index.ntotal, config)
    partial = partial_of(output)
    with locked(partial):
        log.info("%s: reading its %d vectors of %d numbers for a checksum", path, index.ntotal, index.d)
        taken_from = {"index": path.name, **dataclasses.asdict(file_entry(path))}
        begin_vectors(partial, config, table, taken_from)
        encoder = Encoder(
            partial / passage_encoder(config), encoder_settings(config), choose_device(config.devices[0])
        )
        if index.d != encoder.dim:
            raise DataError(
                f"{path} has vectors of {index.d} numbers, expected {encoder.dim} as {config.encoder} makes"
                " them"
            )
        _compare(config, table, rows, encoder)
        _copy_shards(partial, config, table, rows)
        vectors_version = seal_vectors(partial, config, table, taken_from)
        partial.rename(output)
    log.info("%s: %d vectors of %s, version %s", output, len(table), path.name, vectors_version[:16])
    return vectors_version


class _Rows:
    """Which row of the index is a passage's."""

    def __init__(self, table: PassageTable, num_vectors: int, config: ImportIndexConfig) -> None:
        """Raises DataError when the counts differ."""
        self._index, self._num_vectors, self._order = config.index, num_vectors, config.order
        self._ids = self._places = None
        found, of = len(table), config.passages
        if config.order is not None:
            ids = _ids_in_order(Path(config.order))
            self._places = np.argsort(ids, kind="stable")
            self._ids = ids[self._places]
            found, of = len(ids), config.order
        if found != num_vectors:
            raise DataError(
                f"{config.index} holds {num_vectors} vectors, expected {found}, the passages of {of}: give"
                " the file that the index was built from (as order, where it has rows that the import left"
                " out)"
            )

    def of(self, passages: list[SourcedPassage]) -> np.ndarray:
        """Rows [N] of the index. Raises DataError that names a passage without one."""
        if self._ids is None or self._places is None:
            return np.array([self._number(passage.id) for passage in passages])
        wanted = np.array([passage.id.encode() for passage in passages])
        places = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        missing = np.flatnonzero(self._ids[places] != wanted)
        if len(missing):
            id_ = passages[missing[0]].id
            raise DataError(
                f"{self._order} has no passage {id_!r}, expected all of them: give the file of this import"
            )
        return self._places[places]

    def _number(self, id_: str) -> int:
        if id_.isascii() and id_.isdigit() and int(id_) < self._num_vectors and str(int(id_)) == id_:
            return int(id_)
        raise DataError(
            f"passage {id_!r} has no row in {self._index}: expected ids 0 to {self._num_vectors - 1}, which"
            " are row numbers; give the file that the index was built from as order"
        )


def _ids_in_order(path: Path) -> np.ndarray:
    """The ids of a passages file, as UTF-8 bytes of one width, whose order is that of strings. 20 bytes or
    so an id."""
    ids = _parsed_ids(path)
    pieces = []
    while piece := list(islice(ids, _IDS_AT_A_TIME)):
        pieces.append(np.array(piece))
    if not pieces:
        raise DataError(f"{path} holds no rows: expected the passages that the index was built from")
    return np.concatenate(pieces)


def _parsed_ids(path: Path) -> Iterator[bytes]:
    """A row that is broken has its place, too, and no id."""
    for line, row in read_rows(path):
        try:
            yield b"" if isinstance(row, RowError) else parse_passage(row).id.encode()
        except RowError as error:
            log.warning("%s is left out: %s", line.place, error)
            yield b""


def _open(path: Path) -> faiss.Index:
    """The index, memory-mapped. Raises DataError for another kind."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"{path} is no FAISS index that can be read ({reason}); join the parts of one by `cat`"
        ) from error
    kind = type(index).__name__
    if kind not in _KINDS or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        metric = (
            "inner product"
            if index.metric_type == faiss.METRIC_INNER_PRODUCT
            else f"metric {index.metric_type}"
        )
        raise DataError(
            f"{path} is an {kind} of {metric}, expected {' or '.join(_KINDS)} of inner product: encode"
            " instead"
        )
    return index


def _vectors(path: Path, rows: np.ndarray) -> np.ndarray:
    """Float32 [N, dim]. The mapping lasts as long as the call: pages that were read do not add up."""
    return _open(path).reconstruct_batch(rows)


def _compare(config: ImportIndexConfig, table: PassageTable, rows: _Rows, encoder: Encoder) -> None:
    """Encode some passages. Raises DataError that names one whose vector in the index points elsewhere."""
    numbers = np.unique(np.linspace(0, len(table) - 1, config.checked_passages).astype(int)).tolist()
    passages = [
        passage
        for number in numbers
        for batch in table.batches(number, number + 1)
        for passage in from_batch(batch)
    ]
    theirs = _vectors(Path(config.index), rows.of(passages))
    ours = encoder.encode([format_passage(config.passage_format, passage) for passage in passages])
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
    cosines = np.sum(theirs * ours, axis=1) / np.maximum(lengths, 1e-30)
    for passage, row, cosine in zip(passages, rows.of(passages), cosines, strict=True):
        if not cosine > _LEAST_COSINE:
            raise DataError(
                f"passage {passage.id!r}: its vector, row {row} of {config.index}, has a cosine of"
                f" {cosine:.3f} with the one that {config.encoder} makes, expected above {_LEAST_COSINE}:"
                f" encoder, passage_format {config.passage_format!r}, pooling, max_tokens or the order of the"
                " passages are not those of the index"
            )
    log.info("%d passages encoded for comparison: the least cosine is %.5f", len(passages), cosines.min())
    if encoder.settings.normalize and np.abs(np.linalg.norm(theirs, axis=1) - 1).max() > 1e-2:
        raise DataError(
            f"{config.index} holds vectors not of length 1, expected that with normalize true: set it to"
            " false"
        )


def _copy_shards(partial: Path, config: ImportIndexConfig, table: PassageTable, rows: _Rows) -> None:
    num_shards = -(-len(table) // config.rows_per_shard)
    for number in range(num_shards):
        path = partial / f"vectors-{number:05d}.npy"
        if path.exists():
            continue
        start = number * config.rows_per_shard
        batches = table.batches(start, min(start + config.rows_per_shard, len(table)))
        passages = [passage for batch in batches for passage in from_batch(batch)]
        vectors = _vectors(Path(config.index), rows.of(passages)).astype(np.float16)
        if not np.isfinite(vectors).all():
            raise DataError(
                f"{config.index} holds NaN or values beyond float16 among the passages from"
                f" {passages[0].id!r} on"
            )
        write_shard(path, vectors)
        log.info("shard %d of %d", number + 1, num_shards)
