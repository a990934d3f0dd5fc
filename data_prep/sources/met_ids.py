"""The ids of the rows that were read so far, each with the place of its row, for those who look for
repeated ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Protocol

_CACHE_KIB = 32 << 10  # of SQLite's pages: 600,000 ids; more ids than that are looked up on the disk


class MetIds(Protocol):
    """What knows the ids that were met."""

    def meet(self, id_: Any, place: str) -> str | None:
        """Where this id was met before; None for a new one, which is remembered with its place."""
        ...


class IdsInMemory:
    """Ids of any kind in a dictionary: about 200 bytes each."""

    def __init__(self) -> None:
        self._places: dict[Hashable, str] = {}

    def meet(self, id_: Hashable, place: str) -> str | None:
        """As MetIds says."""
        first = self._places.get(id_)
        if first is None:
            self._places[id_] = place
        return first


class IdsOnDisk:
    """Ids that are strings, in an SQLite file that only this object reads: the memory is that of its cache,
    however many."""

    def __init__(self, path: Path, known: Iterable[tuple[str, str]]) -> None:
        """known: (id, place) of those that are met already. A file that a killed program left is replaced."""
        path.unlink(missing_ok=True)
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        for pragma in (
            "journal_mode = OFF",
            "synchronous = OFF",
            "locking_mode = EXCLUSIVE",
            f"cache_size = -{_CACHE_KIB}",
        ):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE met (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")  # never committed: the file ends with its reader
        for id_, place in known:
            self.meet(id_, place)

    def meet(self, id_: str, place: str) -> str | None:
        """As MetIds says. Raises OSError when the disk is full."""
        try:
            if self._database.execute("INSERT OR IGNORE INTO met VALUES (?, ?)", (id_, place)).rowcount:
                return None
            return str(self._database.execute("SELECT place FROM met WHERE id = ?", (id_,)).fetchone()[0])
        except sqlite3.Error as error:
            raise OSError(
                f"{self._path} cannot be written ({error}); make room on the disk and start again"
            ) from error

    def close(self) -> None:
        """Remove the file."""
        self._database.close()
        self._path.unlink(missing_ok=True)
