"""scored.rank_N.jsonl: the groups that a rank has scored so far, a line each, so that a killed scoring goes
on, on any ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from eval.credit.queries import QueryCredit
from eval.samples import read_lines
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.errors import DataError

_PATTERN = "scored.rank_*.jsonl"


class Scored:
    """What is scored in a directory; this rank appends to a file of its own."""

    def __init__(self, directory: Path, *, rank: int):
        self._directory = directory
        self._path = directory / f"scored.rank_{rank}.jsonl"

    def mend(self) -> None:
        """Cut what a kill left of a line off; before any rank reads or writes."""
        for path in self._directory.glob(_PATTERN):
            cut_torn_line(path)

    def read(self) -> dict[int, list[QueryCredit]]:
        """The queries' credit of every group that any rank has scored, by its number. Raises DataError for
        a damaged file."""
        found = {}
        for path in sorted(self._directory.glob(_PATTERN)):
            for number, line in enumerate(read_lines(path), start=1):
                try:
                    found[int(line["group"])] = [_query(fields) for fields in line["queries"]]
                except (KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}:{number} is no scored group ({error}); choose another --output"
                    ) from error
        return found

    def keep(self, group: int, queries: Sequence[QueryCredit]) -> None:
        """Write a group down, and wait until the disk has it."""
        append_lines(
            self._path, [{"group": group, "queries": [dataclasses.asdict(query) for query in queries]}]
        )


def _query(fields: dict) -> QueryCredit:
    return QueryCredit(**{**fields, "log_ratios": tuple(fields["log_ratios"])})
