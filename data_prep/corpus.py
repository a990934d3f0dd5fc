"""Passages from JSON lines.

Accepted rows: our own {"id", "title", "text"} (further fields are ignored; a missing title is empty) and Search-R1's
{"id", "contents"}, whose contents are the title in double quotes, a line break, and the text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

from data_prep.jsonl import Row, RowError, check_rejects, id_field, read_records, string_field, write_rejects, write_rows
from megatron_sd.records import Passage

log = logging.getLogger(__name__)


def parse_passage(row: Row) -> Passage:
    """One row of either format. Raises RowError."""
    if "contents" in row:
        title, separator, text = string_field(row, "contents").partition("\n")
        if not separator or not text.strip():
            raise RowError("field 'contents' has no text after its first line, expected '\"title\"\\ntext'")
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return Passage(id=id_field(row), title=title, text=text)
    title = row.get("title", "")
    if not isinstance(title, str):
        raise RowError(f"field 'title' is {title!r}, expected a string")
    return Passage(id=id_field(row), title=title, text=string_field(row, "text"))


def read_passages(path: Path, *, rejects: Path, max_reject_share: float) -> list[Passage]:
    """The passages of a file; broken rows go to the `rejects` file. Raises DataError when too many are broken."""
    passages, broken = read_records(path, parse_passage)
    write_rejects(rejects, broken)
    check_rejects(path, broken, len(passages) + len(broken), max_reject_share)
    if broken:
        log.warning("%s: %d rows rejected, see %s; the first: %s", path, len(broken), rejects, broken[0])
    return passages


def write_passage_rows(path: Path, passages: Iterable[Passage]) -> None:
    """Write our own format, which `sd-search data index` reads."""
    write_rows(path, (dataclasses.asdict(passage) for passage in passages))
