"""Rows of public files: JSON lines, JSON arrays, Parquet, CSV, TSV, or a folder of text, each row with its place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.jsonl import Line, Row, RowError, check_row, decode_row, read_lines, read_text
from megatron_sd.errors import DataError

Record = TypeVar("Record")
_TEXT_SUFFIXES = (".txt", ".md")
_WRAPPERS = ("Data", "data", "questions")  # keys under which a JSON file may hold its list of rows


def parse_rows(path: Path, parse: Callable[[Row, Line], Record]) -> Iterator[tuple[Line, Record | RowError]]:
    """Every row with its record, or with what is wrong with it. A repeated record id is an error.

    Memory: about 150 bytes a row, for the ids that were met.
    """
    first: dict[str, tuple[str, int]] = {}
    for line, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            record = parse(row, line)
        except RowError as error:
            yield line, error
            continue
        place = (line.file, line.number)
        file, number = first.setdefault(record.id, place)
        yield line, record if (file, number) == place else RowError(f"id {record.id!r} repeats that of {file}:{number}")


def read_rows(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
    """Every row of a file or folder, or what is wrong with it. The format follows from the name; .gz and .zst are read through.

    Raises DataError when a file is missing, damaged or of no known format.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zst")), "")
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: found a file of type {suffix!r}, expected one of {known} (also .gz, .zst), or a folder")
    yield from READERS[suffix](path)


def _folder(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
    """A folder of Parquet files, or of texts: one row each, with the relative path as id and the name as title."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    tables = [file for file in files if file.suffix == ".parquet"]
    texts = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    if bool(tables) == bool(texts):
        found = "both" if tables else "neither"
        raise DataError(f"{path}: found {found}, expected a folder of .parquet files or of {' and '.join(_TEXT_SUFFIXES)} files")
    for file in tables:
        yield from _parquet(file)
    for file in texts:
        name = file.relative_to(path).as_posix()
        line = Line(file=name, number=1, content=b"")
        try:
            yield line, {"id": name, "title": file.stem.replace("_", " "), "text": file.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            yield line, RowError(f"not valid UTF-8 ({error})")


def _jsonl(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
    for number, content in read_lines(path):
        yield _checked(Line(file=path.name, number=number, content=content), lambda content=content: decode_row(content))


def _json(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
    """A list of objects, or an object that holds one under a usual name; `line` is then the place in the list, from 1."""
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected a list of objects") from error
    if isinstance(rows, dict):
        rows = next((rows[key] for key in _WRAPPERS if isinstance(rows.get(key), list)), None)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows; expected a JSON list, or one under {' or '.join(_WRAPPERS)}")
    yield from _objects(path, rows)


def _parquet(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        yield from _objects(path, (row for batch in batches for row in batch.to_pylist()))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}; expected a Parquet file") from error


def _separated(separator: str) -> Callable[[Path], Iterator[tuple[Line, Row | RowError]]]:
    def read(path: Path) -> Iterator[tuple[Line, Row | RowError]]:
        csv.field_size_limit(1 << 24)
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
        try:
            for row in reader:
                line = Line(file=path.name, number=reader.line_num, content=json.dumps(row, default=str).encode())
                is_whole = None not in row and None not in row.values()
                yield line, row if is_whole else RowError(f"expected {len(reader.fieldnames)} fields, as line 1 has")
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}; expected fields separated by {separator!r}") from error

    return read


def _objects(path: Path, rows: Iterable[Any]) -> Iterator[tuple[Line, Row | RowError]]:
    for number, row in enumerate(rows, start=1):
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
