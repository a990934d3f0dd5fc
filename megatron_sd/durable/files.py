"""Files that are whole or not there, whatever ends the process or the machine."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path, *, writer: str = "") -> Iterator[Path]:
    """A temporary name to write to, in the same directory; the file gets the name `path`, in the place of an
    older one, when the block ends well and its bytes are on the disk.

    writer: tells those apart that may write the same file at one time.
    """
    temporary = path.with_name(f".{path.name}{writer and '.'}{writer}.tmp")
    yield temporary
    flush([temporary])
    os.replace(temporary, path)


def write_whole(path: Path, content: bytes | str) -> None:
    """A small file at once. Text is UTF-8; what no UTF-8 can hold (a lone surrogate) becomes a question
    mark."""
    with whole_file(path) as temporary:
        temporary.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", errors="replace")
        )


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line a record, all of them by one write, and wait until the disk has them. Raises
    OSError; a reader leaves out the half line that may then stand at the end."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    content = lines.encode("utf-8", errors="replace")
    with path.open("ab", buffering=0) as file:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, "only part of a slice could be written", str(path))
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last line break: half a line, which a killed program left. A missing file
    is left alone."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def flush(paths: Iterable[Path]) -> None:
    """Flush files to disk. Whoever wrote a file must do it: on a shared file system others cannot."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
