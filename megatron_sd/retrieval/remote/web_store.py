"""What web searches found, in a file: each query once, for every rank, every restart, and for whoever replays it.

{"made_by": {"engine": "serper", "url": ..., "num_results": 10}}
{"query": "mayor of Lyon", "passages": [{"id": ADDRESS, "title": ..., "text": ...}, ...]}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sd.durable.shared_lines import SharedLines
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Passage


class WebStore:
    """A file of JSON lines that processes may add to at one time: under a lock, and the first answer to a
    query stands for all. One object serves one thread at a time.

    Raises DataError for a file that cannot be read as such, ConfigError for one of another engine.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], *, may_add: bool) -> None:
        """made_by: what the answers depend on. may_add: the file is made where there is none."""
        self._lines = SharedLines(path)
        self._found: dict[str, tuple[Passage, ...]] = {}
        self._made_by = dict(made_by)
        self._is_begun = False  # the first line, which says what the others are of, was read
        if may_add:
            with self._lines.locked():
                if not path.exists() or path.stat().st_size == 0:
                    self._lines.add([{"made_by": self._made_by}])
        elif not path.is_file():
            raise DataError(
                f"retriever.web.store: found no file {path} to replay, expected one that a run with"
                " retriever.web.mode record has written"
            )
        self.refresh()

    def __len__(self) -> int:
        """Queries."""
        return len(self._found)

    def find(self, query: str) -> tuple[Passage, ...] | None:
        """What a search for it found; None: it has not been searched for, as far as this object has read."""
        return self._found.get(query)

    def keep(self, query: str, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        """Add an answer, durable when this returns. Comes back with what stands: another process's, if it
        was first."""
        with self._lines.locked():
            self.refresh()
            if query not in self._found:
                self._lines.add(
                    [{"query": query, "passages": [dataclasses.asdict(passage) for passage in passages]}]
                )
                self.refresh()
        return self._found[query]

    def refresh(self) -> None:
        """Read what was added since."""
        for line in self._lines.new():
            self._add(line)

    def digest(self) -> str:
        """Of the whole file."""
        return hashlib.sha256(self._lines.path.read_bytes()).hexdigest()

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if not self._is_begun:
                self._check(record["made_by"])
                self._is_begun = True
                return
            passages = tuple(Passage(**fields) for fields in record["passages"])
            self._found.setdefault(record["query"], passages)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"retriever.web.store: {self._lines.path} is no record of web searches ({error!r}): found the line"
                f" {line[:80]!r}; expected what retriever.web.mode record writes"
            ) from error

    def _check(self, made_by: Any) -> None:
        if made_by != self._made_by:
            raise ConfigError(
                f"retriever.web: {self._lines.path} holds answers of {made_by}, expected {self._made_by}: choose another"
                " store, or the settings it was made with"
            )
