"""Reading and writing JSON lines, plain or compressed, without ever dropping a line in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import zstandard

from megatron_sd.durable.files import whole_file
from megatron_sd.errors import DataError

Row = dict[str, Any]
Record = TypeVar("Record")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_BLOCK_BYTES = 1 << 20
_MARK = b"\xef\xbb\xbf"  # a byte order mark, which Excel writes


class RowError(ValueError):
    """One row cannot be used; the message says what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A row, or a part of one, that was left out: where it was (`line` counts from 1), why, and its
    content."""

    file: str
    line: int
    reason: str
    content: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One raw line and where it stood."""

    file: str
    number: int
    content: bytes

    @property
    def place(self) -> str:
        """FILE:LINE."""
        return f"{self.file}:{self.number}"

    def reject(self, reason: str) -> Reject:
        """Leave it out, or a part of it, for this reason."""
        return Reject(
            file=self.file, line=self.number, reason=reason, content=self.content.decode(errors="replace")
        )


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of the non-blank lines. Raises DataError when the file is missing,
    truncated or corrupt."""
    for number, line in enumerate(read_raw_lines(path), start=1):
        if line.strip():
            yield number, line


def read_raw_lines(path: Path) -> Iterator[bytes]:
    """All lines, without their line breaks. Raises DataError when the file is missing, truncated or
    corrupt."""
    return _split_lines(read_blocks(path))


def read_text(path: Path) -> str:
    """A whole file as UTF-8. Raises DataError when it is missing, truncated, corrupt or not UTF-8."""
    try:
        return b"".join(read_blocks(path)).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {error}; expected UTF-8") from error


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file, plain or compressed, in blocks, without a byte order mark.

    Raises DataError when it is missing, truncated or corrupt.
    """
    try:
        with open(path, "rb") as handle:
            yield from _without_mark(_blocks(path, handle))
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected a file, plain, .gz, .zst, .bz2 or .xz"
        ) from error


def _without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    start = b""
    for block in blocks:  # a first block may be shorter than the mark
        start += block
        if len(start) >= len(_MARK):
            break
    yield start.removeprefix(_MARK)
    yield from blocks


def _blocks(path: Path, handle: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".zst":
        return _zstd_blocks(handle)
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix)
    source = opened(handle) if opened else handle
    return iter(lambda: source.read(_BLOCK_BYTES), b"")


def _zstd_blocks(handle: BinaryIO) -> Iterator[bytes]:
    """Content of all frames. The library's own reader stops in silence at the end of the first frame or of
    a truncated file."""
    frame = None
    while block := handle.read(_BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the file ends within a compressed frame")


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def decode_row(line: bytes) -> Row:
    """One line as an object. Raises RowError."""
    try:
        row = json.loads(line)
        # a lone surrogate passes json.loads and could never be written again
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({error})") from error
    return check_row(row)


def check_row(row: Any) -> Row:
    """A decoded row, if it is an object. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError(f"found a JSON {type(row).__name__}, expected an object")
    return row


def check_rejects(path: Path, rejects: list[Reject], num_rows: int, max_reject_share: float) -> None:
    """Raise DataError when more than the allowed share of the rows was rejected, or when nothing is left."""
    if num_rows == 0:
        raise DataError(f"{path} holds no rows: expected at least one")
    if len(rejects) > max_reject_share * num_rows:
        raise DataError(
            f"{path}: {len(rejects)} of {num_rows} rows are broken, more than the allowed share of"
            f" {max_reject_share:g}; the first: {rejects[0]}; mend the file or allow more with"
            " max_reject_share"
        )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Plain JSON lines, all of them or no file of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_rejects(path: Path, rejects: list[Reject]) -> None:
    """Write the rejects file, or remove an older one when nothing was rejected."""
    if rejects:
        write_rows(path, (vars(reject) for reject in rejects))
    else:
        path.unlink(missing_ok=True)


def string_field(row: Row, name: str) -> str:
    """A field that must be a non-blank string. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field {name!r} is {value!r}, expected a non-empty string")
    return value


def id_field(row: Row, name: str = "id") -> str:
    """The id, a non-empty string or a whole number (7.0, as pandas writes it, is 7). Raises RowError."""
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return string_field(row, name)
