"""Passages from public files: into a passages directory, or straight into an index when they fit in memory.

Accepted rows: our own {"id", "title", "text"} (a missing title is empty; of further fields `source` and `license` are kept) and
Search-R1's and FlashRAG's {"id", "contents"}, whose contents are the title in double quotes, a line break, and the text.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.jsonl import Line, Reject, Row, RowError, check_rejects, id_field, string_field, write_rejects
from data_prep.rows import parse_rows
from data_prep.table import Origin, PassageTable, SourcedPassage, is_table, write_table
from megatron_sd.records import Passage
from megatron_sd.retrieval.passages import split_contents

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PassageRules:
    """What passages get when their rows do not say it, and the longest text that is taken."""

    source: str
    license: str
    max_text_bytes: int


def parse_passage(row: Row) -> Passage:
    """One row of either format. Raises RowError."""
    if "contents" in row:
        title, text = split_contents(string_field(row, "contents"))
        if not text.strip():
            raise RowError("field 'contents' has no text after its first line, expected '\"title\"\\ntext'")
    else:
        title, text = row.get("title") or "", string_field(row, "text")
    if not isinstance(title, str):
        raise RowError(f"field 'title' is {title!r}, expected a string")
    passage = Passage(id=id_field(row), title=" ".join(title.splitlines()), text=text)
    for name, value in vars(passage).items():
        if "\0" in value:
            raise RowError(f"field {name!r} holds a NUL character, expected text")
    return passage


def parse_sourced(row: Row, line: Line, *, rules: PassageRules) -> SourcedPassage:
    """One row with its source and licence. Raises RowError."""
    passage = parse_passage(row)
    num_bytes = len(passage.text.encode())
    if num_bytes > rules.max_text_bytes:
        raise RowError(
            f"field 'text' has {num_bytes} bytes, expected at most {rules.max_text_bytes}: cut it, or raise max_text_bytes "
            "and chunk it (`sd-search data chunk`)"
        )
    labels = {name: _label(row, name) or getattr(rules, name) for name in ("source", "license")}
    return SourcedPassage(**vars(passage), **labels)


def _label(row: Row, name: str) -> str:
    value: Any = row.get(name)
    if not isinstance(value, str | None):
        raise RowError(f"field {name!r} is {value!r}, expected a string")
    return value or ""


@dataclass
class Tally:
    """What became of the rows of one file so far."""

    num_kept: int = 0
    rejects: list[Reject] = dataclasses.field(default_factory=list)


def sourced_passages(path: Path, rules: PassageRules, tally: Tally, max_reject_share: float) -> Iterator[SourcedPassage]:
    """The passages of a file or folder, broken rows counted. Raises DataError at the end when too many were broken."""
    for line, result in parse_rows(path, functools.partial(parse_sourced, rules=rules)):
        if isinstance(result, RowError):
            tally.rejects.append(line.reject(str(result)))
        else:
            tally.num_kept += 1
            yield result
    check_rejects(path, tally.rejects, tally.num_kept + len(tally.rejects), max_reject_share)


def import_passages(path: Path, output: Path, *, rejects: Path, rules: PassageRules, max_reject_share: float) -> Tally:
    """Write a passages directory; broken rows go to the `rejects` file. Raises DataError, and then leaves no directory."""
    tally = Tally()
    try:
        write_table(output, sourced_passages(path, rules, tally, max_reject_share), Origin())
    finally:
        write_rejects(rejects, tally.rejects)
    return tally


def read_passages(path: Path, *, rejects: Path, max_reject_share: float) -> list[Passage]:
    """The passages of a file; broken rows go to the `rejects` file. Raises DataError when too many are broken."""
    tally = Tally()
    rules = PassageRules(source="", license="", max_text_bytes=1 << 30)
    try:
        passages: list[Passage] = list(sourced_passages(path, rules, tally, max_reject_share))
    finally:
        write_rejects(rejects, tally.rejects)
    if tally.rejects:
        log.warning("%s: %d rows rejected, see %s; the first: %s", path, len(tally.rejects), rejects, tally.rejects[0])
    return passages


def any_passages(path: Path) -> Iterator[Passage]:
    """The passages of a passages directory or of any accepted file. Raises DataError, at the end for broken rows."""
    if is_table(path):
        yield from PassageTable(path)
        return
    rules = PassageRules(source="", license="", max_text_bytes=1 << 30)
    yield from sourced_passages(path, rules, Tally(), max_reject_share=0.0)
