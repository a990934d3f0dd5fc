"""A file of JSON lines that several processes add to, and that each reads as it grows."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.durable.growing_file import GrowingFile


class SharedLines:
    """The lines of `path`. One object serves one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GrowingFile(path)

    def new(self) -> list[bytes]:
        """Those that were added since the last call, none where there is no file."""
        return self._file.take().lines

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Whole, and on the disk when this returns. To be called while locked."""
        append_lines(self.path, records)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The file is this process's alone, and without a line that a crash left half-written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cut_torn_line(self.path)
            yield
