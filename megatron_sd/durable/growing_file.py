"""A file that others append lines to, read as it grows: only what is new, and half a line is left for later."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class NewLines:
    """Whole lines that were not there before, without their line breaks. anew: the file is another one, or was
    cut: what was read of it before does not hold."""

    lines: list[bytes]
    anew: bool


class GrowingFile:
    """Reads; it writes nothing and locks nothing. offset: bytes of the lines that were taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self.offset = 0

    def take(self) -> NewLines:
        """What was appended since the last call. A missing file has no lines yet."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return NewLines(lines=[], anew=False)
        with file:
            status = os.fstat(file.fileno())
            anew = self.offset > 0 and (status.st_ino != self._inode or status.st_size < self.offset)
            if anew:
                self.offset = 0
            self._inode = status.st_ino
            file.seek(self.offset)
            content = file.read(status.st_size - self.offset)
        *lines, half = content.split(b"\n")
        self.offset += len(content) - len(half)
        return NewLines(lines=lines, anew=anew)
