"""Rows of public files: JSON lines, JSON arrays, Parquet, CSV, TSV, or a folder of them or of texts, each
row with its place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.json_rows import are_json_lines, json_rows
from data_prep.sources.jsonl import (
    COMPRESSED,
    Line,
    Row,
    RowError,
    check_row,
    decode_row,
    read_blocks,
    read_lines,
)
from data_prep.sources.met_ids import IdsInMemory, MetIds
from data_prep.sources.separated import read_separated
from megatron_sd.errors import DataError

Record = TypeVar("Record")
# of a file, less so many rows from its start
Reader = Callable[[Path, int], Iterator[tuple[Line, Row | RowError]]]
_TEXT_SUFFIXES = (".txt", ".md")


def parse_rows(
    path: Path,
    parse: Callable[[Row, Line], Record],
    *,
    num_done: int = 0,
    met: MetIds | None = None,
    key: Callable[[Record], Hashable] = attrgetter("id"),
) -> Iterator[tuple[Line, Record | RowError]]:
    """Every row with its record, or with what is wrong with it. A repeated key is an error; it is
    the record's id, or what `key` makes of it.

    The first `num_done` rows are passed over; met: knows the ids among them, and is told the others. None:
    they are kept in memory.
    """
    met = IdsInMemory() if met is None else met
    for line, row in read_rows(path, num_done):
        try:
            if isinstance(row, RowError):
                raise row
            record = parse(row, line)
        except RowError as error:
            yield line, error
            continue
        first = met.meet(key(record), line.place)
        yield line, record if first is None else RowError(f"id {record.id!r} repeats that of {first}")


def read_rows(path: Path, num_done: int = 0) -> Iterator[tuple[Line, Row | RowError]]:
    """Every row of a file or folder, or what is wrong with it. The format follows from the name, or from
    the first byte where the name says nothing; .gz, .zst, .bz2 and .xz are read through.

    num_done: rows from the start that are passed over without a look into them. JSON lines are not decoded,
    of Parquet the row groups and of a folder of texts the files are not read.

    Raises DataError when a file is missing, damaged or of no known format.
    """
    if path.is_dir():
        yield from _folder(path, num_done)
        return
    suffix = _suffix(path)
    if suffix == "":
        suffix = (
            ".parquet"
            if _start(path).startswith(b"PAR1")
            else ".json"
            if _start(path).lstrip()[:1] in (b"{", b"[")
            else ""
        )
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(
            f"{path}: found a file of type {suffix!r}, expected one of {known} (also"
            f" {', '.join(COMPRESSED)}), a file without suffix that begins as JSON or Parquet, or a folder"
        )
    yield from READERS[suffix](path, num_done)


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in COMPRESSED), "")


def _start(path: Path) -> bytes:
    return next(read_blocks(path), b"")


def _folder(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """A folder of one kind of file: of rows, in order of name; or of texts: one row each, the relative path
    its id."""
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "_"))
    )
    tables = [file for file in files if _suffix(file) in READERS]
    texts = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    if not tables and not texts:  # WikiExtractor's wiki_00
        tables = [file for file in files if _suffix(file) == ""]
    kinds = sorted({_suffix(file) for file in tables} | ({"texts"} if texts else set()))
    if len(kinds) != 1:
        found = " and ".join(kinds) or "neither"
        known = (
            f".parquet files or of {' and '.join(_TEXT_SUFFIXES)} files, or of another kind alone"
            f" ({', '.join(READERS)})"
        )
        raise DataError(f"{path}: found {found}, expected a folder of {known}")
    yield from _tables(path, tables, num_done)
    for file in texts[num_done:]:
        name = file.relative_to(path).as_posix()
        line = Line(file=name, number=1, content=b"")
        try:
            yield (
                line,
                {
                    "id": name,
                    "title": file.stem.replace("_", " "),
                    "text": file.read_text(encoding="utf-8-sig"),
                },
            )
        except UnicodeDecodeError as error:
            yield line, RowError(f"not valid UTF-8 ({error})")


def _tables(path: Path, files: list[Path], num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """The rows of several files; Parquet files that are done are not read, of others the rows are counted."""
    for file in files:
        if file.suffix == ".parquet":
            with _reading(file):
                num_rows = pq.read_metadata(file).num_rows
            if num_done < num_rows:
                yield from _parquet(file, num_done)
            num_done = max(0, num_done - num_rows)
            continue
        name = file.relative_to(path).as_posix()
        for line, row in read_rows(file):
            if num_done:
                num_done -= 1
                continue
            yield Line(file=name, number=line.number, content=line.content), row


def _jsonl(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    for number, content in islice(read_lines(path), num_done, None):
        yield _checked(
            Line(file=path.name, number=number, content=content), lambda content=content: decode_row(content)
        )


def _json(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """A list of objects, or an object that holds one under a usual name, `line` is then the place in it
    from 1; or JSON lines."""
    if are_json_lines(path):
        yield from _jsonl(path, num_done)
    else:
        yield from _objects(path, islice(json_rows(path), num_done, None), num_done + 1)


def _parquet(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    with _reading(path):
        file = pq.ParquetFile(path)
        group, row = 0, 0  # the first row group that is needed, and its first row
        while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= num_done:
            row += file.metadata.row_group(group).num_rows
            group += 1
        batches = file.iter_batches(batch_size=1024, row_groups=list(range(group, file.num_row_groups)))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from _objects(path, islice(rows, num_done - row, None), num_done + 1)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; expected a Parquet file") from error


def _objects(path: Path, rows: Iterable[Any], start: int) -> Iterator[tuple[Line, Row | RowError]]:
    for number, row in enumerate(rows, start=start):
        content = json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace")
        yield _checked(Line(file=path.name, number=number, content=content), lambda row=row: check_row(row))


def _checked(line: Line, decode: Callable[[], Row]) -> tuple[Line, Row | RowError]:
    try:
        return line, decode()
    except RowError as error:
        return line, error


READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": read_separated,
    ".tsv": read_separated,
}
