"""Rows of public files: JSON lines, JSON arrays, Parquet, CSV, TSV, or a folder of text, each row with its place."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.jsonl import Line, Row, RowError, check_row, decode_row, read_lines, read_text
from megatron_sd.errors import DataError

Record = TypeVar("Record")
Reader = Callable[[Path, int], Iterator[tuple[Line, Row | RowError]]]  # of a file, less so many rows from its start
_TEXT_SUFFIXES = (".txt", ".md")
_WRAPPERS = ("Data", "data", "questions")  # keys under which a JSON file may hold its list of rows


def parse_rows(
    path: Path, parse: Callable[[Row, Line], Record], *, num_done: int = 0, places: dict[str, str] | None = None
) -> Iterator[tuple[Line, Record | RowError]]:
    """Every row with its record, or with what is wrong with it. A repeated record id is an error.

    The first `num_done` rows are passed over; places: of the ids among them. Memory: about 150 bytes a row, for the ids that were
    met.
    """
    places = {} if places is None else places
    for line, row in read_rows(path, num_done):
        try:
            if isinstance(row, RowError):
                raise row
            record = parse(row, line)
        except RowError as error:
            yield line, error
            continue
        if record.id in places:
            yield line, RowError(f"id {record.id!r} repeats that of {places[record.id]}")
            continue
        places[record.id] = line.place
        yield line, record


def read_rows(path: Path, num_done: int = 0) -> Iterator[tuple[Line, Row | RowError]]:
    """Every row of a file or folder, or what is wrong with it. The format follows from the name; .gz and .zst are read through.

    num_done: rows from the start that are passed over without a look into them. JSON lines are not decoded, of Parquet the row
    groups and of a folder the files are not read; JSON, CSV and TSV are read whole all the same.

    Raises DataError when a file is missing, damaged or of no known format.
    """
    if path.is_dir():
        yield from _folder(path, num_done)
        return
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: found a file of type {suffix!r}, expected one of {known} (also .gz, .zst), or a folder")
    yield from READERS[suffix](path, num_done)


def _folder(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """A folder of Parquet files, or of texts: one row each, with the relative path as id and the name as title."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    tables = [file for file in files if file.suffix == ".parquet"]
    texts = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    if bool(tables) == bool(texts):
        found = "both" if tables else "neither"
        raise DataError(f"{path}: found {found}, expected a folder of .parquet files or of {' and '.join(_TEXT_SUFFIXES)} files")
    for file in tables:
        with _reading(file):
            num_rows = pq.read_metadata(file).num_rows
        if num_done < num_rows:
            yield from _parquet(file, num_done)
        num_done = max(0, num_done - num_rows)
    for file in texts[num_done:]:
        name = file.relative_to(path).as_posix()
        line = Line(file=name, number=1, content=b"")
        try:
            yield line, {"id": name, "title": file.stem.replace("_", " "), "text": file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            yield line, RowError(f"not valid UTF-8 ({error})")


def _jsonl(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    for number, content in islice(read_lines(path), num_done, None):
        yield _checked(Line(file=path.name, number=number, content=content), lambda content=content: decode_row(content))


def _json(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """A list of objects, or an object that holds one under a usual name; `line` is then the place in the list, from 1."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected a list of objects") from error
    if isinstance(rows, dict):
        rows = next((rows[key] for key in _WRAPPERS if isinstance(rows.get(key), list)), None)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows; expected a JSON list, or one under {' or '.join(_WRAPPERS)}")
    yield from _objects(path, rows[num_done:], num_done + 1)


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


def _separated(separator: str) -> Reader:
    def read(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
        csv.field_size_limit(1 << 24)
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
        try:
            for row in islice(reader, num_done, None):
                line = Line(file=path.name, number=reader.line_num, content=json.dumps(row, default=str).encode())
                is_whole = None not in row and None not in row.values()
                yield line, row if is_whole else RowError(f"expected {len(reader.fieldnames)} fields, as line 1 has")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}; expected fields separated by {separator!r}") from error

    return read


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
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}
