"""Passages between the stages: numbered Parquet shards (zstd) with a manifest, rows in id order, however many there are.

Every row carries its source and its licence. Rows may come in any order: they are sorted in pieces that fit in memory, spilled,
and merged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sd.errors import DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.manifest import Manifest, file_entries, open_manifest, write_manifest
from megatron_sd.retrieval.passages import ROWS_PER_BATCH, SCHEMA

ROWS_PER_SHARD = 64 * ROWS_PER_BATCH  # 262,144 rows: about 80 MB of Wikipedia
_ROWS_PER_SPILL = 32 * ROWS_PER_BATCH  # about 130 MB in memory
_SPILL_READ_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class SourcedPassage(Passage):
    """A passage and where it comes from."""

    source: str = ""
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a table came to be, for its manifest."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    made_from: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_table(output: Path, passages: Iterable[SourcedPassage], origin: Origin) -> str:
    """Write a passages directory and return its version. The same rows in any order give the same bytes.

    A directory named `output` is always complete. Raises DataError when it exists, when there is no row, or for a repeated id.
    """
    with new_directory(output) as partial:
        spill = partial / "spill"
        num_passages = 0
        sources: set[str] = set()
        licenses: set[str] = set()
        rows = sort_passages(passages, spill)
        for number, shard in enumerate(_groups(_unique(rows), ROWS_PER_SHARD)):
            table = pa.Table.from_batches(to_batches(shard), schema=SCHEMA)
            path = partial / f"passages-{number:05d}.parquet"
            pq.write_table(table, path, compression="zstd", row_group_size=ROWS_PER_BATCH)
            num_passages += len(shard)
            sources.update(passage.source for passage in shard)
            licenses.update(passage.license for passage in shard)
        if num_passages == 0:
            raise DataError(f"no passage to write to {output}: expected at least one")
        shutil.rmtree(spill, ignore_errors=True)
        manifest = Manifest(
            kind="passages",
            num_passages=num_passages,
            licenses=tuple(sorted(licenses - {""})),
            sources=tuple(sorted(sources - {""})),
            settings=origin.settings,
            made_from=origin.made_from,
            versions={"pyarrow": version("pyarrow")},
            files=file_entries(partial),
        )
        return write_manifest(partial, manifest)


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to fill that gets the name `output` only when the block ends well; else nothing of it stays.

    Raises DataError when `output` exists.
    """
    if output.exists():
        raise DataError(f"{output} exists: remove it or choose another output; it is never changed in place")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(output)


def sort_passages(passages: Iterable[SourcedPassage], spill: Path) -> Iterator[SourcedPassage]:
    """The passages in id order. More than fit in memory go through files in the directory `spill`."""
    remaining = iter(passages)
    files: list[Path] = []
    while rows := sorted(islice(remaining, _ROWS_PER_SPILL), key=attrgetter("id")):
        if not files and len(rows) < _ROWS_PER_SPILL:
            yield from rows
            return
        spill.mkdir(parents=True, exist_ok=True)
        files.append(spill / f"{len(files):05d}.arrow")
        with pa.OSFile(str(files[-1]), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for batch in to_batches(rows, _SPILL_READ_ROWS):
                writer.write_batch(batch)
    yield from heapq.merge(*map(_read_spill, files), key=attrgetter("id"))


def _read_spill(path: Path) -> Iterator[SourcedPassage]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield from from_batch(batch)


def _unique(passages: Iterable[SourcedPassage]) -> Iterator[SourcedPassage]:
    previous = None
    for passage in passages:
        if passage.id == previous:
            raise DataError(f"passage ids must be unique: found {previous!r} twice")
        previous = passage.id
        yield passage


def _groups(passages: Iterable[SourcedPassage], size: int) -> Iterator[list[SourcedPassage]]:
    remaining = iter(passages)
    while rows := list(islice(remaining, size)):
        yield rows


def to_batches(passages: Iterable[Passage], size: int = ROWS_PER_BATCH) -> Iterator[pa.RecordBatch]:
    """Batches of `size` rows, the last one shorter; passages without source or licence get empty ones."""
    remaining = iter(passages)
    while rows := list(islice(remaining, size)):
        columns = [[getattr(passage, name, "") for passage in rows] for name in SCHEMA.names]
        yield pa.record_batch(columns, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterator[SourcedPassage]:
    """The rows of a batch."""
    for values in zip(*(batch.column(name).to_pylist() for name in SCHEMA.names)):
        yield SourcedPassage(**dict(zip(SCHEMA.names, values)))


class PassageTable:
    """A verified passages directory. Reads one row group at a time."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError that names a missing or damaged file."""
        self.directory = directory
        self.manifest, self.version = open_manifest(directory, "passages")
        self._shards = sorted(name for name in self.manifest.files if name.endswith(".parquet"))

    def __len__(self) -> int:
        return self.manifest.num_passages

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """Rows start .. stop, cut where ROWS_PER_BATCH divides the row number."""
        row, stop = start, len(self) if stop is None else stop
        while row < stop:
            shard, offset = divmod(row, ROWS_PER_SHARD)
            group, skip = divmod(offset, ROWS_PER_BATCH)
            rows = pq.ParquetFile(self.directory / self._shards[shard]).read_row_group(group).slice(skip, stop - row)
            yield rows.cast(SCHEMA).combine_chunks().to_batches()[0]
            row += rows.num_rows

    def __iter__(self) -> Iterator[SourcedPassage]:
        for batch in self.batches():
            yield from from_batch(batch)


def is_table(path: Path) -> bool:
    """Whether a path is a directory that one of the stages wrote."""
    return (path / "manifest.json").is_file()
