"""Rows of JSON files: a list of objects, read as a stream; an object that holds the list; or JSON lines by
another name."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources.jsonl import read_blocks, read_lines, read_text
from megatron_sd.errors import DataError

_WRAPPERS = ("Data", "data", "questions")  # keys under which a JSON file may hold its list of rows
_SPACE = " \t\r\n"
_MAX_HELD = 1 << 28  # characters of one object


def are_json_lines(path: Path) -> bool:
    """Whether a file's first line is an object by itself, and does not hold the list of rows."""
    for _, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(row, dict) and not any(isinstance(row.get(key), list) for key in _WRAPPERS)
    return False


def json_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON list, one by one; a list within an object is read whole. Raises DataError for
    anything else."""
    blocks = _text_blocks(path)
    start = next((block for block in blocks if block.strip()), "")
    if start.lstrip().startswith("["):
        try:
            yield from _items(start.lstrip()[1:], blocks)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON ({error}); expected a list of objects") from error
        return
    yield from _wrapped(path)


def _wrapped(path: Path) -> list[Any]:
    try:
        rows = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); expected a list of objects") from error
    if isinstance(rows, dict):
        rows = next((rows[key] for key in _WRAPPERS if isinstance(rows.get(key), list)), None)
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds no list of rows; expected a JSON list, or one under {' or '.join(_WRAPPERS)}"
        )
    return rows


def _text_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in read_blocks(path):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {error}; expected UTF-8") from error


def _items(held: str, blocks: Iterator[str]) -> Iterator[Any]:
    """The items of a list whose opening bracket was read. Raises ValueError."""
    decode, place, is_first = json.JSONDecoder().raw_decode, 0, True
    while True:
        held, place = _at_sign(held, place, blocks)
        if held[place] == "]":
            return _check_end(held[place + 1 :], blocks)
        if not is_first:
            if held[place] != ",":
                raise ValueError(f"found {held[place : place + 20]!r}, expected a comma or the list's end")
            held, place = _at_sign(held, place + 1, blocks)
        item, place, held = _item(decode, held, place, blocks)
        yield item
        is_first = False


def _at_sign(held: str, place: int, blocks: Iterator[str]) -> tuple[str, int]:
    """The text and the place of its next character that is no white space."""
    while True:
        while place < len(held) and held[place] in _SPACE:
            place += 1
        if place < len(held):
            return held, place
        block = next(blocks, None)
        if block is None:
            raise ValueError("the file ends within the list")
        held, place = block, 0


def _item(decode: Any, held: str, place: int, blocks: Iterator[str]) -> tuple[Any, int, str]:
    """One item, and the place after it; as much of the file is read on as it needs, each time twice as
    much."""
    while True:
        try:
            item, end = decode(held, place)
            if end < len(held):  # a number may go on in the next block
                return item, end, held
            error: ValueError | None = None
        except ValueError as found:
            error = found
        held, place = held[place:], 0
        more: list[str] = []
        while sum(map(len, more)) <= len(held) and (block := next(blocks, None)) is not None:
            more.append(block)
        if not more or len(held) > _MAX_HELD:
            raise error or ValueError("the file ends within the list")
        held += "".join(more)


def _check_end(rest: str, blocks: Iterator[str]) -> None:
    for text in (rest, *blocks):
        if text.strip():
            raise ValueError(f"Extra data after the list: {text.strip()[:20]!r}")
