"""Rows on their way to a passages directory: taken from a source in its order, sorted in pieces that fit in
memory, merged.

    runs/00000.arrow   the passages of a piece in id order, each with the place its row stood at
    runs/00000.json    written last: how far the source was read by then, what was rejected, the piece's checksum

Whatever kills it, the next start asks the source for the rows after the last finished piece.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path

import pyarrow as pa

from data_prep.passages.sourced import SourcedPassage, from_batch, to_batches
from data_prep.sources.jsonl import Reject
from megatron_sd.durable.files import whole_file, write_whole
from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.manifest import FileEntry, file_entry
from megatron_sd.retrieval.corpus.passages import ROWS_PER_BATCH, SCHEMA

log = logging.getLogger(__name__)

ROWS_PER_RUN = 32 * ROWS_PER_BATCH  # about 130 MB in memory
_READ_ROWS = 512  # of each run, while merging
_PLACED = SCHEMA.append(pa.field("place", pa.string()))


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one row of a source became: passages, or a reject. place: file and line, for those who look for
    repeated ids."""

    passages: Sequence[SourcedPassage] = ()
    place: str = ""
    reject: Reject | None = None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The record of a finished piece. num_read: rows of the source from its start to the end of this
    piece."""

    num_read: int
    num_rows: int
    is_last: bool
    sources: tuple[str, ...]
    licenses: tuple[str, ...]
    rejects: tuple[Reject, ...]
    file: FileEntry


class SortedRuns:
    """The finished pieces in a directory."""

    def __init__(self, directory: Path) -> None:
        """Check what lies there. Raises DataError for a damaged piece."""
        self.directory = directory
        self._runs: list[_Run] = []
        directory.mkdir(exist_ok=True)
        while (record := directory / f"{len(self._runs):05d}.json").exists():
            self._runs.append(_read_record(record))
        if self._runs:
            log.info("%s: going on after %s finished rows", directory, f"{self.num_read:,}")

    @property
    def num_read(self) -> int:
        """Rows of the source that need not be read again."""
        return self._runs[-1].num_read if self._runs else 0

    @property
    def num_rows(self) -> int:
        """Passages they became."""
        return sum(run.num_rows for run in self._runs)

    @property
    def rejects(self) -> list[Reject]:
        """Rows that were left out so far, in the source's order."""
        return [reject for run in self._runs for reject in run.rejects]

    def labels(self, name: str) -> tuple[str, ...]:
        """All `sources` or `licenses` but the empty one, in order."""
        return tuple(sorted({label for run in self._runs for label in getattr(run, name)} - {""}))

    def places(self) -> Iterator[tuple[str, str]]:
        """Every passage's id and the place of its row."""
        for path in self._paths():
            for batch in _batches(path):
                yield from zip(batch.column("id").to_pylist(), batch.column("place").to_pylist())

    def extend(self, taken: Iterator[Taken], rows_per_run: int) -> None:
        """Write the rest of the pieces from the rows of the source after `num_read`; a kill loses at most
        one."""
        while not self._runs or not self._runs[-1].is_last:
            # no name: two pieces at a time would be held
            self._runs.append(self._write(*_next_piece(taken, rows_per_run)))
            log.info(
                "%s: %s rows read, %s passages", self.directory, f"{self.num_read:,}", f"{self.num_rows:,}"
            )

    def _write(self, piece: list[Taken], is_last: bool) -> _Run:
        path = self.directory / f"{len(self._runs):05d}.arrow"
        rows = [(passage, own.place) for own in piece for passage in own.passages]
        rows.sort(key=lambda row: row[0].id)
        passages, places = map(itemgetter(0), rows), [place for _, place in rows]
        with (
            whole_file(path) as unfinished,
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, _PLACED) as writer,
        ):
            for number, batch in enumerate(to_batches(passages, _READ_ROWS)):
                own = places[number * _READ_ROWS :][: batch.num_rows]
                writer.write_batch(
                    pa.record_batch([*batch.columns, pa.array(own, pa.string())], schema=_PLACED)
                )
        run = _Run(
            num_read=self.num_read + len(piece),
            num_rows=len(rows),
            is_last=is_last,
            sources=tuple(sorted({passage.source for passage, _ in rows})),
            licenses=tuple(sorted({passage.license for passage, _ in rows})),
            rejects=tuple(own.reject for own in piece if own.reject is not None),
            file=file_entry(path),
        )
        write_whole(path.with_suffix(".json"), json.dumps(dataclasses.asdict(run)))
        return run

    def merged(self, start: str | None) -> Iterator[SourcedPassage]:
        """All passages in id order, from the id `start` on."""
        yield from heapq.merge(*(_read_run(path, start) for path in self._paths()), key=attrgetter("id"))

    def _paths(self) -> list[Path]:
        return [self.directory / f"{number:05d}.arrow" for number in range(len(self._runs))]


def _next_piece(taken: Iterator[Taken], size: int) -> tuple[list[Taken], bool]:
    """Rows of the source until they, or the passages they became, are `size`; and whether the source has
    ended."""
    piece: list[Taken] = []
    num_passages = 0
    for own in taken:
        piece.append(own)
        num_passages += len(own.passages)
        if max(len(piece), num_passages) >= size:
            return piece, False
    return piece, True


def _read_record(path: Path) -> _Run:
    again = "what was finished is removed; start again"
    try:
        fields = json.loads(path.read_bytes())
        lists = {name: tuple(fields.pop(name)) for name in ("sources", "licenses")}
        rejects = tuple(Reject(**reject) for reject in fields.pop("rejects"))
        run = _Run(**lists, rejects=rejects, file=FileEntry(**fields.pop("file")), **fields)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is corrupt ({error}): {again}") from error
    rows = path.with_suffix(".arrow")
    if not rows.is_file() or file_entry(rows) != run.file:
        raise DataError(f"{rows} is missing or does not match its checksum in {path.name}: {again}")
    return run


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def _read_run(path: Path, start: str | None) -> Iterator[SourcedPassage]:
    for batch in _batches(path):
        if start is None or batch.column("id")[-1].as_py() >= start:
            yield from (passage for passage in from_batch(batch) if start is None or passage.id >= start)
