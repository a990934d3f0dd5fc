"""Rows of CSV and TSV files, read as a stream: one record in memory, whatever the file's size.

CSV is RFC 4180's. TSV comes in two kinds, and one file may hold both: fields in double quotes (DPR's
psgs_w100.tsv), and fields joined by tabs as they are (MS MARCO, ColBERT, LoTTE), where a quote is a
character like any other. A line that has as many fields as the header is a row by itself; of its fields
those that are quoted from end to end lose their quotes. Only a line with another number of fields, or one
whose last field opens a quote that lines without a tab go on and close, is read as quoted text.
"""

from __future__ import annotations

import ast
import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_prep.sources.jsonl import Line, Row, RowError, read_raw_lines
from megatron_sd.errors import DataError

MAX_RECORD_BYTES = 1 << 24  # a longer row is rejected: no passage or question has 16 MiB
_NO_HEADER = ("question", "answer")  # DPR's *.qa.csv


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What stands from line `number` on: fields, or what is wrong with them."""

    number: int
    content: bytes
    fields: list[str] | RowError


class _Lines:
    """Raw lines of a file that can be given back."""

    def __init__(self, path: Path) -> None:
        self._rest = enumerate(read_raw_lines(path), start=1)
        self._given_back: deque[tuple[int, bytes]] = deque()

    def take(self) -> tuple[int, bytes] | None:
        return self._given_back.popleft() if self._given_back else next(self._rest, None)

    def give_back(self, lines: list[tuple[int, bytes]]) -> None:
        self._given_back.extendleft(reversed(lines))


def read_separated(path: Path, num_done: int) -> Iterator[tuple[Line, Row | RowError]]:
    """Every row of a CSV or TSV file, less `num_done` from its start. The first line holds the names of the
    fields.

    Bounded memory: one record of at most 16 MiB and a block of the file. Raises DataError for a file
    without a header line.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(path)
    first = lines.take()
    while first is not None and not first[1].strip():
        first = lines.take()
    if first is None:
        return
    separator = _separator(path, first[1])
    if _is_dpr(first[1]):
        lines.give_back([first])
        header = list(_NO_HEADER)
    else:
        lines.give_back([first])
        header = _header(path, _next_record(lines, separator, None), separator)
    for record in islice(_records(lines, separator, len(header)), num_done, None):
        line = Line(file=path.name, number=record.number, content=record.content)
        yield line, record.fields if isinstance(record.fields, RowError) else dict(zip(header, record.fields))


def _separator(path: Path, first: bytes) -> str:
    is_tsv = ".tsv" in path.suffixes or (b"\t" in first and b"," not in first) or _is_dpr(first)
    return "\t" if is_tsv else ","


def _is_dpr(first: bytes) -> bool:
    """Whether the line is a question, a tab and a list of answers, as in DPR's files without header."""
    fields = first.decode(errors="replace").rstrip("\r\n").split("\t")
    answers = _unquoted(fields[-1])
    if len(fields) != 2 or not (answers.startswith("[") and answers.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(answers), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _header(path: Path, record: _Record | None, separator: str) -> list[str]:
    assert record is not None
    if isinstance(record.fields, RowError):
        raise DataError(
            f"{path}:{record.number}: {record.fields}; expected a header line: names separated by"
            f" {separator!r}"
        )
    names = [name.strip() for name in record.fields]
    shown = [name[:40] for name in names]
    hint = "add a line such as 'id<TAB>text<TAB>title' in front, in the order of the columns"
    place = f"{path}:{record.number}"
    if any(name.replace(".", "", 1).isdigit() for name in names):
        raise DataError(
            f"{place}: there is no header line: found a row, {shown}; expected names of fields: {hint}"
        )
    if len(set(names)) < len(names):
        raise DataError(
            f"{place}: found the names {shown}, expected each once: there may be no header line; {hint}"
        )
    return names


def _records(lines: _Lines, separator: str, num_fields: int) -> Iterator[_Record]:
    while (record := _next_record(lines, separator, num_fields)) is not None:
        yield record


def _next_record(lines: _Lines, separator: str, num_fields: int | None) -> _Record | None:
    """The next record; num_fields: how many fields it must have, None for the header."""
    taken = lines.take()
    while taken is not None and not taken[1].strip(b"\r\n"):
        taken = lines.take()
    if taken is None:
        return None
    number, content = taken
    if len(content) > MAX_RECORD_BYTES:
        reason = f"the row has {len(content)} bytes, expected at most {MAX_RECORD_BYTES}"
        return _Record(number=number, content=content[:1000], fields=RowError(reason))
    whole = _tab_fields(content, num_fields) if separator == "\t" else None
    if whole is None or _opens_quote(whole[-1]):
        quoted = _quoted_record(lines, (number, content), separator, num_fields)
        if whole is None or not isinstance(quoted.fields, RowError):
            return quoted
    return _Record(number=number, content=content, fields=[_unquoted(field) for field in whole])


def _tab_fields(content: bytes, num_fields: int | None) -> list[str] | None:
    """The fields between tabs, when there are as many as there must be."""
    try:
        fields = content.decode().rstrip("\r").split("\t")
    except UnicodeDecodeError:
        return None
    return fields if num_fields in (None, len(fields)) else None


def _opens_quote(field: str) -> bool:
    return field.startswith('"') and _unquoted(field) == field


def _unquoted(field: str) -> str:
    """The content of a field that is quoted from end to end, its quotes doubled; any other field as it is."""
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if is_quoted else field


def _quoted_record(
    lines: _Lines, first: tuple[int, bytes], separator: str, num_fields: int | None
) -> _Record:
    """The record of quoted fields that begins at `first`; lines that are not its own are given back."""
    taken = [first]
    num_quotes, num_bytes = first[1].count(b'"'), len(first[1])
    is_whole = separator == "\t" and _tab_fields(first[1], num_fields) is not None
    while num_quotes % 2 and num_bytes <= MAX_RECORD_BYTES and (line := lines.take()) is not None:
        taken.append(line)
        num_quotes, num_bytes = num_quotes + line[1].count(b'"'), num_bytes + len(line[1])
        is_row = separator == "\t" and num_fields != 1 and _tab_fields(line[1], num_fields) is not None
        if is_row and (is_whole or num_quotes % 2):  # a row by itself: the quote before it was no quote
            break
    try:
        fields = _parsed(b"\n".join(content for _, content in taken), separator, num_fields)
        return _Record(number=first[0], content=b"\n".join(content for _, content in taken), fields=fields)
    except RowError as error:
        lines.give_back(taken[1:])
        return _Record(number=first[0], content=first[1], fields=error)


def _parsed(content: bytes, separator: str, num_fields: int | None) -> list[str]:
    try:
        text = content.decode().removesuffix("\r")
        (fields,) = csv.reader([text], delimiter=separator, strict=True)
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 ({error})") from error
    except (csv.Error, ValueError) as error:
        raise RowError(
            f"{error}; expected fields separated by {separator!r}, quoted from end to end or not at all"
        ) from error
    if num_fields is not None and len(fields) != num_fields:
        raise RowError(f"found {len(fields)} fields, expected {num_fields} fields, as line 1 has")
    return fields
