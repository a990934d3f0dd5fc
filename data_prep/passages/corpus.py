"""Passages from public files: into a passages directory, or straight into an index when they fit in memory.

Accepted rows: our own {"id", "title", "text"} (a missing title is empty; of further fields `source` and
`license` are kept), and the forms of passage_rows.py.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.passages.runs import SortedRuns, Taken
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, PassageTable, is_table, write_resumable
from data_prep.sources.jsonl import Line, Reject, Row, RowError, check_rejects, read_lines, write_rejects
from data_prep.sources.met_ids import IdsOnDisk, MetIds
from data_prep.sources.passage_rows import parse_passage
from data_prep.sources.rows import parse_rows
from megatron_sd.errors import DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.manifest import file_entries, file_entry, read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PassageRules:
    """What passages get when their rows do not say it, and the longest text that is taken."""

    source: str
    license: str
    max_text_bytes: int


def parse_sourced(row: Row, line: Line, *, rules: PassageRules) -> SourcedPassage:
    """One row with its source and licence. Raises RowError."""
    passage = parse_passage(row)
    num_bytes = len(passage.text.encode())
    if num_bytes > rules.max_text_bytes:
        raise RowError(
            f"field 'text' has {num_bytes} bytes, expected at most {rules.max_text_bytes}: cut it, or raise"
            " max_text_bytes and chunk it (`sd-search data chunk`)"
        )
    labels = {name: _label(row, name) or getattr(rules, name) for name in ("source", "license")}
    return SourcedPassage(**vars(passage), **labels)


def _label(row: Row, name: str) -> str:
    value: Any = row.get(name)
    if not isinstance(value, str | None):
        raise RowError(f"field {name!r} is {value!r}, expected a string")
    return value or ""


@dataclass
class ImportTally:
    """What became of the rows of one file so far."""

    num_kept: int = 0
    rejects: list[Reject] = dataclasses.field(default_factory=list)


def import_passages(
    path: Path,
    output: Path,
    *,
    rejects: Path,
    rules: PassageRules,
    max_reject_share: float,
    rows_per_run: int,
) -> tuple[int, int]:
    """Write a passages directory; broken rows go to the `rejects` file. Passages kept, and rows rejected.

    Killed and started again it goes on where it was. Raises DataError, and then leaves no directory.
    """

    def rest(runs: SortedRuns) -> Iterator[Taken]:
        tally = ImportTally(num_kept=runs.num_rows, rejects=runs.rejects)
        met = IdsOnDisk(runs.directory / "ids.sqlite", runs.places())
        try:
            yield from _take(path, rules, tally, num_done=runs.num_read, met=met)
        finally:  # before the last run is finished, after which the source is not read again
            met.close()
            write_rejects(rejects, tally.rejects)
        check_rejects(path, tally.rejects, tally.num_kept + len(tally.rejects), max_reject_share)

    begun_from = None  # a pipe can be read only once
    if not path.is_fifo():
        limits = {"max_reject_share": max_reject_share}
        begun_from = {"import": dataclasses.asdict(rules) | limits, "input": _input_entries(path)}
    write_resumable(output, rest, Origin(), begun_from=begun_from, rows_per_run=rows_per_run)
    manifest, _ = read_manifest(output, "passages")
    return manifest.num_passages, sum(1 for _ in read_lines(rejects)) if rejects.exists() else 0


def _input_entries(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, or of every file of a folder. Raises DataError when one cannot be read."""
    try:
        entries = file_entries(path) if path.is_dir() else {path.name: file_entry(path)}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; expected a file or a folder") from error
    return {name: dataclasses.asdict(entry) for name, entry in entries.items()}


def _take(
    path: Path, rules: PassageRules, tally: ImportTally, *, num_done: int = 0, met: MetIds | None = None
) -> Iterator[Taken]:
    """What each row of a file or folder becomes, after `num_done` rows whose ids are `met`; the tally
    counts on."""
    parse = functools.partial(parse_sourced, rules=rules)
    for line, result in parse_rows(path, parse, num_done=num_done, met=met):
        if isinstance(result, RowError):
            tally.rejects.append(line.reject(str(result)))
            yield Taken(reject=tally.rejects[-1])
        else:
            tally.num_kept += 1
            yield Taken(passages=(result,), place=line.place)


def read_passages(path: Path, *, rejects: Path, max_reject_share: float) -> list[Passage]:
    """The passages of a file; broken rows go to the `rejects` file. Raises DataError when too many are
    broken."""
    tally = ImportTally()
    try:
        passages = list(_passages(path, tally, max_reject_share))
    finally:
        write_rejects(rejects, tally.rejects)
    if tally.rejects:
        log.warning(
            "%s: %d rows rejected, see %s; the first: %s", path, len(tally.rejects), rejects, tally.rejects[0]
        )
    return passages


def any_passages(path: Path, max_reject_share: float = 0.0) -> Iterable[Passage]:
    """The passages of a passages directory or of any accepted file. Raises DataError, at the end for too
    many broken rows."""
    return PassageTable(path) if is_table(path) else _passages(path, ImportTally(), max_reject_share)


def _passages(path: Path, tally: ImportTally, max_reject_share: float) -> Iterator[Passage]:
    rules = PassageRules(source="", license="", max_text_bytes=1 << 30)
    for own in _take(path, rules, tally):
        yield from own.passages
    check_rejects(path, tally.rejects, tally.num_kept + len(tally.rejects), max_reject_share)
