"""Passages between the stages: numbered Parquet shards (zstd) with a manifest, rows in id order, however
many there are.

Every row carries its source and its licence. Rows may come in any order: they are sorted in pieces that fit
in memory (runs.py) and merged.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.passages.runs import ROWS_PER_RUN, SortedRuns, Taken
from data_prep.passages.sourced import SourcedPassage, from_batch, to_batches
from megatron_sd.durable.files import whole_file
from megatron_sd.durable.resumable import Plan, new_directory
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_entry,
    open_manifest,
    read_manifest,
    write_manifest,
)
from megatron_sd.retrieval.corpus.passages import ROWS_PER_BATCH, SCHEMA

ROWS_PER_SHARD = 64 * ROWS_PER_BATCH  # 262,144 rows: about 80 MB of Wikipedia
_RUNS = "runs"

Source = Callable[[SortedRuns], Iterator[Taken]]  # the rows that come after those of the finished runs


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a table came to be, for its manifest."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    made_from: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_table(output: Path, passages: Iterable[SourcedPassage], origin: Origin) -> str:
    """Write a passages directory and return its version. The same rows in any order give the same bytes.

    A directory named `output` is always complete, and nothing else stays. Raises DataError when it exists,
    when there is no row, or for a repeated id.
    """
    with new_directory(output) as partial:
        return _fill(
            partial, lambda _: (Taken(passages=(passage,)) for passage in passages), origin, ROWS_PER_RUN
        )


def write_resumable(
    output: Path, source: Source, origin: Origin, *, begun_from: Mapping[str, Any] | None, rows_per_run: int
) -> str:
    """`write_table` from a source that can go on in its middle: killed and started again it gives the same
    bytes.

    begun_from: everything that shapes the rows, as JSON values; None: start anew whatever lies there.
    rows_per_run: source rows, or passages they become, that a kill can lose. Raises DataError as
    `write_table`, also for a directory that was begun from something else, and ConfigError.
    """
    if rows_per_run < 1:
        raise ConfigError(f"rows_per_run: found {rows_per_run}, expected at least 1")
    finished = (f"{_RUNS}/*.json", MANIFEST_NAME)
    versions = {"versions": {"pyarrow": version("pyarrow")}}
    plan = None if begun_from is None else Plan(begun_from=versions | dict(begun_from), finished=finished)
    with new_directory(output, plan) as partial:
        return _fill(partial, source, origin, rows_per_run)


def _fill(partial: Path, source: Source, origin: Origin, rows_per_run: int) -> str:
    """From wherever the last start was killed: runs, then shards, then the manifest; the runs go last."""
    if not (partial / MANIFEST_NAME).exists():
        runs = SortedRuns(partial / _RUNS)
        runs.extend(source(runs), rows_per_run)
        if runs.num_rows == 0:
            raise DataError(f"no passage to write to {partial}: expected at least one")
        manifest = Manifest(
            kind="passages",
            num_passages=runs.num_rows,
            licenses=runs.labels("licenses"),
            sources=runs.labels("sources"),
            settings=origin.settings,
            made_from=origin.made_from,
            versions={"pyarrow": version("pyarrow")},
            files={path.name: file_entry(path) for path in _write_shards(partial, runs)},
        )
        write_manifest(partial, manifest)
    if (partial / _RUNS).exists():
        shutil.rmtree(partial / _RUNS)
    return read_manifest(partial, "passages")[1]


def _write_shards(partial: Path, runs: SortedRuns) -> list[Path]:
    """The shards that are not there yet; all shards. Raises DataError for a repeated id."""
    shards = sorted(partial.glob("passages-*.parquet"))
    last_id = pq.read_table(shards[-1], columns=["id"]).column("id")[-1].as_py() if shards else None
    rows = _unique(runs.merged(last_id))
    if shards:
        next(rows)  # the last one that is written: it must not come twice
    for shard in _groups(rows, ROWS_PER_SHARD):
        shards.append(partial / f"passages-{len(shards):05d}.parquet")
        with whole_file(shards[-1]) as path, pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for batch in to_batches(shard, ROWS_PER_BATCH):
                writer.write_batch(batch)  # a row group
    return shards


def _unique(passages: Iterable[SourcedPassage]) -> Iterator[SourcedPassage]:
    previous = None
    for passage in passages:
        if passage.id == previous:
            raise DataError(f"passage ids must be unique: found {previous!r} twice")
        previous = passage.id
        yield passage


def _groups(passages: Iterable[SourcedPassage], size: int) -> Iterator[Iterator[SourcedPassage]]:
    """Groups of `size`, each to be read before the next is asked for."""
    remaining = iter(passages)
    for first in remaining:
        yield chain([first], islice(remaining, size - 1))


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
            rows = (
                pq.ParquetFile(self.directory / self._shards[shard])
                .read_row_group(group)
                .slice(skip, stop - row)
            )
            yield rows.cast(SCHEMA).combine_chunks().to_batches()[0]
            row += rows.num_rows

    def __iter__(self) -> Iterator[SourcedPassage]:
        for batch in self.batches():
            yield from from_batch(batch)


def is_table(path: Path) -> bool:
    """Whether a path is a directory that one of the stages wrote."""
    return (path / "manifest.json").is_file()
