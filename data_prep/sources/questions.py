"""Import of questions and passages from public files, every broken row accounted for.

Accepted question rows (JSON lines, JSON, Parquet, CSV, TSV, also .gz or .zst; unknown fields are ignored),
beside the native ones of formats.py:

    {"id", "text", "golden_answers", "source", "split", "supporting": [[passage id, ...], ...]}          our own
    {"id", "question", "golden_answers", "dataset", "split", "supporting": [{"title", "ids"}, ...]}      with titles
    {"id", "question", "golden_answers", "data_source"}                                      Search-R1's and FlashRAG's

`source`, `split` and `supporting` may be missing; `golden_answers` may be a single string.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.passages.corpus import PassageRules, any_passages, import_passages
from data_prep.passages.runs import ROWS_PER_RUN
from data_prep.sources.beir import Judged, file_of, judged_query, read_judged
from data_prep.sources.formats import to_own
from data_prep.sources.golds import UnanswerableError, read_golds
from data_prep.sources.jsonl import (
    Line,
    Reject,
    Row,
    RowError,
    check_rejects,
    id_field,
    string_field,
    write_rejects,
    write_rows,
)
from data_prep.sources.rows import parse_rows
from data_prep.sources.titles import Titles
from megatron_sd.errors import DataError
from megatron_sd.records import Question
from megatron_sd.search.rewards.answers import empty_answers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`sd-search data import`: one file or folder of questions or passages to our own format, rejects
    beside it."""

    kind: Literal["questions", "passages"]  # what the rows are
    input: str  # a file, or a folder of one kind of files
    # questions: plain jsonl; passages: a directory; rejected rows go beside it, NAME.rejects.jsonl
    output: str
    source: str = ""  # for rows that name no source (questions: no data set)
    license: str = ""  # for rows that name no licence: an SPDX identifier such as CC-BY-SA-4.0
    split: str = ""  # for questions that name no split
    # for questions whose hops have titles: find the ids by title in these passages
    passages: str | None = None
    max_text_bytes: int = 1_000_000  # longer passages are rejected
    # more broken rows than this are an error, and nothing but the rejects file is written
    max_reject_share: float = 0.01
    rows_per_run: int = ROWS_PER_RUN  # rows of passages that are sorted in memory: what a kill can lose


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did. num_notes: rows of accepted questions that lost a gold answer or a hop; noted:
    counts in words."""

    num_kept: int
    num_rejected: int
    num_notes: int
    rejects: str | None  # path of the rejects file, if one was written
    noted: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)


def parse_question(row: Row, titles: Titles | None = None, is_judged: bool = False) -> Question:
    """One row of our own form; hops with titles are looked up in `titles` when it is given, and unknown
    ones left out.

    is_judged: it has hops instead of gold answers. Raises RowError.
    """
    return Question(
        id=id_field(row),
        text=string_field(row, "text" if "text" in row else "question"),
        golden_answers=() if is_judged else tuple(read_golds(row.get("golden_answers"))),
        source=_label(row, "source", "dataset", "data_source"),
        split=_label(row, "split"),
        supporting=tuple(ids for _, ids in _hops(row, titles) if ids),
    )


def _label(row: Row, *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if not isinstance(value, str):
        raise RowError(f"field {names[0]!r} is {value!r}, expected a string")
    return value


def _hops(row: Row, titles: Titles | None) -> list[tuple[str, tuple[str, ...]]]:
    """Title (empty where it does not matter) and passage ids of each hop; no ids: the passages have no such
    title."""
    named = [] if titles is None else row.get("supporting_titles", [])
    hops = [*_list(row.get("supporting") or [], "supporting"), *({"title": title} for title in named)]
    return [_hop(hop, titles) for hop in hops]


def _hop(hop: Any, titles: Titles | None) -> tuple[str, tuple[str, ...]]:
    if titles is not None and isinstance(hop, dict) and isinstance(hop.get("title"), str):
        return hop["title"], titles.find(hop["title"])
    ids = _list(hop.get("ids") if isinstance(hop, dict) else hop, "supporting")
    if not ids or not all(isinstance(id_, str | int) for id_ in ids):
        raise RowError(
            f"a hop of 'supporting' is {hop!r}, expected a non-empty list of passage ids or {{'title',"
            " 'ids'}"
        )
    return "", tuple(str(id_) for id_ in ids)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"field {name!r} holds {value!r}, expected a list")
    return value


def import_file(config: ImportConfig) -> ImportReport:
    """Convert one file or folder. Raises DataError when it cannot be read or too many of its rows are
    broken."""
    source, output = file_of(Path(config.input), config.kind), Path(config.output)
    rejects_path = output.with_name(output.name.removesuffix(".jsonl") + ".rejects.jsonl")
    noted: Counter[str] = Counter()
    num_notes = 0
    if config.kind == "passages":
        rules = PassageRules(
            source=config.source, license=config.license, max_text_bytes=config.max_text_bytes
        )
        limits = {"max_reject_share": config.max_reject_share, "rows_per_run": config.rows_per_run}
        num_kept, num_rejected = import_passages(source, output, rejects=rejects_path, rules=rules, **limits)
    else:
        found = _read_questions(source, config)
        every = found.rejects + found.unanswerable + found.notes
        write_rejects(rejects_path, sorted(every, key=lambda reject: (reject.file, reject.line)))
        num_kept, num_rejected = len(found.questions), len(found.rejects) + len(found.unanswerable)
        noted, num_notes = found.noted, len(found.notes)
        if found.unanswerable and not num_kept:
            raise DataError(
                f"{source}: none of {num_rejected} rows is a question with an answer; the first: {every[0]}"
            )
        check_rejects(source, found.rejects, num_kept + num_rejected, config.max_reject_share)
        write_question_rows(output, found.questions)
    written = str(rejects_path) if num_rejected or num_notes else None
    log.info("%s: %d %s kept, %d rejected, %d notes", source, num_kept, config.kind, num_rejected, num_notes)
    return ImportReport(
        num_kept=num_kept, num_rejected=num_rejected, num_notes=num_notes, rejects=written, noted=noted
    )


@dataclass(frozen=True, kw_only=True)
class LicensedQuestion(Question):
    """A question, the licence it comes under, and the titles of its hops that no passage has."""

    license: str = ""
    unknown_hops: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Found:
    """What became of the rows of a file. noted: what was done to how many rows, in words."""

    questions: list[LicensedQuestion] = dataclasses.field(default_factory=list)
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    unanswerable: list[Reject] = dataclasses.field(default_factory=list)
    notes: list[Reject] = dataclasses.field(default_factory=list)
    noted: Counter[str] = dataclasses.field(default_factory=Counter)


def _read_questions(path: Path, config: ImportConfig) -> _Found:
    """Questions, rejects, and a note for every question that lost some of its gold answers or hops."""
    found = _Found()
    titles = Titles(any_passages(Path(config.passages), config.max_reject_share)) if config.passages else None
    parse = functools.partial(_parse_licensed, config=config, titles=titles, judged=read_judged(path))
    lines: list[Line] = []
    for line, result in parse_rows(path, parse, key=lambda question: (question.source, question.id)):
        if isinstance(result, UnanswerableError):
            found.unanswerable.append(line.reject(str(result)))
            found.noted["of them unanswerable"] += 1
        elif isinstance(result, RowError):
            found.rejects.append(line.reject(str(result)))
        elif (question := _without_empty(result, line, found)) is not None:
            _note_hops(question, line, found)
            found.questions.append(question)
            lines.append(dataclasses.replace(line, content=b""))
    _name_apart(found, lines)
    return found


def _without_empty(question: LicensedQuestion, line: Line, found: _Found) -> LicensedQuestion | None:
    """The question without gold answers that normalise to nothing; None when no other is left."""
    empty = empty_answers(question.golden_answers)
    if not empty:
        return question
    reason = f"gold answers {empty} normalise to nothing: left out"
    if len(empty) == len(question.golden_answers):
        found.rejects.append(line.reject(reason))
        return None
    found.notes.append(line.reject(reason + ", the question is kept"))
    found.noted["lost an empty gold answer"] += 1
    return dataclasses.replace(
        question, golden_answers=tuple(own for own in question.golden_answers if own not in empty)
    )


def _note_hops(question: LicensedQuestion, line: Line, found: _Found) -> None:
    if question.unknown_hops:
        reason = (
            f"no one passage has the titles {list(question.unknown_hops)}: these hops are unknown, the"
            " question is kept"
        )
        found.notes.append(line.reject(reason))
        found.noted["with an unknown hop"] += 1
    if not question.golden_answers:
        found.noted["without gold answers, for `data recall` alone"] += 1


def _name_apart(found: _Found, lines: list[Line]) -> None:
    """Where an id stands in more than one data set of the file, every id gets the name of its set in
    front."""
    if len({question.id for question in found.questions}) == len(found.questions):
        return
    kept: dict[str, tuple[LicensedQuestion, Line]] = {}
    for question, line in zip(found.questions, lines):
        prefix = f"{question.source}/" if question.source else ""
        own = question.id if question.id.startswith(prefix) else prefix + question.id
        if own in kept:
            found.rejects.append(line.reject(f"id {own!r} repeats that of {kept[own][1].place}"))
        else:
            kept[own] = dataclasses.replace(question, id=own), line
    found.questions = [question for question, _ in kept.values()]
    found.noted["with the data set's name before the id, because ids repeat over sets"] = len(kept)


def _parse_licensed(
    row: Row, line: Line, *, config: ImportConfig, titles: Titles | None, judged: Judged | None
) -> LicensedQuestion:
    """A row of any known format, what it does not say filled in from the configuration."""
    is_judged = judged is not None and {"_id", "text"} <= row.keys() and "golden_answers" not in row
    file = f"-{line.file}" if Path(config.input).is_dir() and not is_judged else ""
    place = f"{config.source or Path(config.input).name.split('.')[0]}{file}-{line.number}"
    own = judged_query(row, judged) if is_judged else to_own(row, place, config.source)
    question = parse_question(own, titles, is_judged)
    labels = {"source": question.source or config.source, "split": question.split or config.split}
    fields = {field.name: getattr(question, field.name) for field in dataclasses.fields(question)}
    unknown = tuple(title for title, ids in _hops(own, titles) if not ids)
    return LicensedQuestion(
        **(fields | labels), license=_label(row, "license") or config.license, unknown_hops=unknown
    )


def write_question_rows(path: Path, questions: Iterable[Question]) -> None:
    """Write our own format, which `megatron_sd.search.questions.load_questions` reads."""
    rows = (dataclasses.asdict(question) for question in questions)
    write_rows(
        path,
        ({name: value for name, value in row.items() if value or name != "unknown_hops"} for row in rows),
    )
