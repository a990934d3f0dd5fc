"""Import of questions and passages from JSON lines, every broken row accounted for.

Accepted question rows (plain, .gz or .zst; unknown fields are ignored):

    {"id", "text", "golden_answers", "source", "split", "supporting": [[passage id, ...], ...]}          our own
    {"id", "question", "golden_answers", "dataset", "split", "supporting": [{"title", "ids"}, ...]}      with titles
    {"id", "question", "golden_answers", "data_source"}                                                  Search-R1's

`source`, `split` and `supporting` may be missing; `golden_answers` may be a single string.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.corpus import parse_passage, write_passage_rows
from data_prep.jsonl import (
    Reject,
    Row,
    RowError,
    check_rejects,
    id_field,
    parse_lines,
    read_records,
    string_field,
    write_rejects,
    write_rows,
)
from megatron_sd.records import Question
from megatron_sd.search.reward import empty_answers

log = logging.getLogger(__name__)

IdsByTitle = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`sd-search data import`: one file of questions or passages to our own format, rejects beside it."""

    kind: Literal["questions", "passages"]
    input: str
    output: str  # plain jsonl; rejected rows go beside it, NAME.rejects.jsonl
    source: str = ""  # for questions that name no data set
    split: str = ""  # for questions that name no split
    passages: str | None = None  # for questions whose hops have titles: find the passage ids by title in this passages file
    max_reject_share: float = 0.01  # more broken rows than this are an error, and nothing but the rejects file is written


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did. `num_notes` counts accepted questions that lost a gold answer that normalises to nothing."""

    num_kept: int
    num_rejected: int
    num_notes: int
    rejects: str | None  # path of the rejects file, if one was written


def parse_question(row: Row, ids_by_title: IdsByTitle | None = None) -> Question:
    """One row of any accepted format; hops with titles are looked up in `ids_by_title` when it is given. Raises RowError."""
    golds = row.get("golden_answers")
    golds = [golds] if isinstance(golds, str) else golds
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
        raise RowError(f"field 'golden_answers' is {golds!r}, expected a non-empty list of strings")
    return Question(
        id=id_field(row),
        text=string_field(row, "text" if "text" in row else "question"),
        golden_answers=tuple(dict.fromkeys(golds)),
        source=_label(row, "source", "dataset", "data_source"),
        split=_label(row, "split"),
        supporting=tuple(_hop(hop, ids_by_title) for hop in _list(row.get("supporting") or [], "supporting")),
    )


def _label(row: Row, *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if not isinstance(value, str):
        raise RowError(f"field {names[0]!r} is {value!r}, expected a string")
    return value


def _hop(hop: Any, ids_by_title: IdsByTitle | None) -> tuple[str, ...]:
    if ids_by_title is not None and isinstance(hop, dict) and "title" in hop:
        if hop["title"] not in ids_by_title:
            raise RowError(f"no passage has the title {hop['title']!r} of a hop: expected one in the passages file")
        return ids_by_title[hop["title"]]
    ids = _list(hop.get("ids") if isinstance(hop, dict) else hop, "supporting")
    if not ids or not all(isinstance(id_, str | int) for id_ in ids):
        raise RowError(f"a hop of 'supporting' is {hop!r}, expected a non-empty list of passage ids or {{'title', 'ids'}}")
    return tuple(str(id_) for id_ in ids)


def read_titles(path: Path) -> dict[str, tuple[str, ...]]:
    """The ids of the passages of each title, in file order. Raises DataError for the first broken row."""
    passages, broken = read_records(path, parse_passage)
    check_rejects(path, broken, len(passages) + len(broken), max_reject_share=0.0)
    ids: dict[str, list[str]] = defaultdict(list)
    for passage in passages:
        ids[passage.title].append(passage.id)
    return {title: tuple(own) for title, own in ids.items()}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"field {name!r} holds {value!r}, expected a list")
    return value


def import_file(config: ImportConfig) -> ImportReport:
    """Convert one file. Raises DataError when it cannot be read or too many of its rows are broken."""
    source, output = Path(config.input), Path(config.output)
    if config.kind == "passages":
        records, rejects = read_records(source, parse_passage)
        notes: list[Reject] = []
    else:
        records, rejects, notes = _read_questions(source, config)
    rejects_path = output.with_name(output.name.removesuffix(".jsonl") + ".rejects.jsonl")
    write_rejects(rejects_path, sorted(rejects + notes, key=lambda reject: reject.line))
    check_rejects(source, rejects, len(records) + len(rejects), config.max_reject_share)
    if config.kind == "passages":
        write_passage_rows(output, records)
    else:
        write_question_rows(output, records)
    written = str(rejects_path) if rejects or notes else None
    log.info("%s: %d %s kept, %d rejected, %d notes", source, len(records), config.kind, len(rejects), len(notes))
    return ImportReport(num_kept=len(records), num_rejected=len(rejects), num_notes=len(notes), rejects=written)


def _read_questions(path: Path, config: ImportConfig) -> tuple[list[Question], list[Reject], list[Reject]]:
    """Questions, rejects, and a note for every question that lost some but not all of its gold answers."""
    questions: list[Question] = []
    rejects: list[Reject] = []
    notes: list[Reject] = []
    ids_by_title = read_titles(Path(config.passages)) if config.passages else None
    for line, result in parse_lines(path, functools.partial(parse_question, ids_by_title=ids_by_title)):
        if isinstance(result, RowError):
            rejects.append(line.reject(str(result)))
            continue
        empty = empty_answers(result.golden_answers)
        reason = f"gold answers {empty} normalise to nothing: left out"
        if len(empty) == len(result.golden_answers):
            rejects.append(line.reject(reason))
            continue
        if empty:
            notes.append(line.reject(reason + ", the question is kept"))
        kept = tuple(answer for answer in result.golden_answers if answer not in empty)
        labels = {"source": result.source or config.source, "split": result.split or config.split}
        questions.append(dataclasses.replace(result, golden_answers=kept, **labels))
    return questions, rejects, notes


def write_question_rows(path: Path, questions: Iterable[Question]) -> None:
    """Write our own format, which `megatron_sd.search.questions.load_questions` reads."""
    write_rows(path, (dataclasses.asdict(question) for question in questions))
