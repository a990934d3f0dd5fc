"""Import of questions and passages from public files, every broken row accounted for.

Accepted question rows (JSON lines, JSON, Parquet, CSV, TSV, also .gz or .zst; unknown fields are ignored), beside the native ones
of formats.py:

    {"id", "text", "golden_answers", "source", "split", "supporting": [[passage id, ...], ...]}          our own
    {"id", "question", "golden_answers", "dataset", "split", "supporting": [{"title", "ids"}, ...]}      with titles
    {"id", "question", "golden_answers", "data_source"}                                      Search-R1's and FlashRAG's

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

from data_prep.corpus import PassageRules, any_passages, import_passages
from data_prep.formats import to_own
from data_prep.jsonl import Line, Reject, Row, RowError, check_rejects, id_field, string_field, write_rejects, write_rows
from data_prep.rows import parse_rows
from data_prep.runs import ROWS_PER_RUN
from megatron_sd.records import Question
from megatron_sd.search.reward import empty_answers

log = logging.getLogger(__name__)

IdsByTitle = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`sd-search data import`: one file or folder of questions or passages to our own format, rejects beside it."""

    kind: Literal["questions", "passages"]
    input: str
    output: str  # questions: plain jsonl; passages: a directory; rejected rows go beside it, NAME.rejects.jsonl
    source: str = ""  # for rows that name no source (questions: no data set)
    license: str = ""  # for rows that name no licence: an SPDX identifier such as CC-BY-SA-4.0
    split: str = ""  # for questions that name no split
    passages: str | None = None  # for questions whose hops have titles: find the ids by title in these passages
    max_text_bytes: int = 1_000_000  # longer passages are rejected
    max_reject_share: float = 0.01  # more broken rows than this are an error, and nothing but the rejects file is written
    rows_per_run: int = ROWS_PER_RUN  # rows of passages that are sorted in memory: what a kill can lose


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
        supporting=_hops(row, ids_by_title),
    )


def _label(row: Row, *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if not isinstance(value, str):
        raise RowError(f"field {names[0]!r} is {value!r}, expected a string")
    return value


def _hops(row: Row, ids_by_title: IdsByTitle | None) -> tuple[tuple[str, ...], ...]:
    titles = [] if ids_by_title is None else row.get("supporting_titles", [])
    hops = [*_list(row.get("supporting") or [], "supporting"), *({"title": title} for title in titles)]
    return tuple(_hop(hop, ids_by_title) for hop in hops)


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
    """The ids of the passages of each title, in their order. Raises DataError for a broken row."""
    ids: dict[str, list[str]] = defaultdict(list)
    for passage in any_passages(path):
        ids[passage.title].append(passage.id)
    return {title: tuple(own) for title, own in ids.items()}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"field {name!r} holds {value!r}, expected a list")
    return value


def import_file(config: ImportConfig) -> ImportReport:
    """Convert one file or folder. Raises DataError when it cannot be read or too many of its rows are broken."""
    source, output = Path(config.input), Path(config.output)
    rejects_path = output.with_name(output.name.removesuffix(".jsonl") + ".rejects.jsonl")
    num_notes = 0
    if config.kind == "passages":
        rules = PassageRules(source=config.source, license=config.license, max_text_bytes=config.max_text_bytes)
        limits = {"max_reject_share": config.max_reject_share, "rows_per_run": config.rows_per_run}
        num_kept, num_rejected = import_passages(source, output, rejects=rejects_path, rules=rules, **limits)
    else:
        questions, rejects, notes = _read_questions(source, config)
        write_rejects(rejects_path, sorted(rejects + notes, key=lambda reject: (reject.file, reject.line)))
        num_kept, num_rejected, num_notes = len(questions), len(rejects), len(notes)
        check_rejects(source, rejects, num_kept + num_rejected, config.max_reject_share)
        write_question_rows(output, questions)
    written = str(rejects_path) if num_rejected or num_notes else None
    log.info("%s: %d %s kept, %d rejected, %d notes", source, num_kept, config.kind, num_rejected, num_notes)
    return ImportReport(num_kept=num_kept, num_rejected=num_rejected, num_notes=num_notes, rejects=written)


@dataclass(frozen=True, kw_only=True)
class LicensedQuestion(Question):
    """A question and the licence it comes under."""

    license: str = ""


def _read_questions(path: Path, config: ImportConfig) -> tuple[list[LicensedQuestion], list[Reject], list[Reject]]:
    """Questions, rejects, and a note for every question that lost some but not all of its gold answers."""
    questions: list[LicensedQuestion] = []
    rejects: list[Reject] = []
    notes: list[Reject] = []
    ids_by_title = read_titles(Path(config.passages)) if config.passages else None
    for line, result in parse_rows(path, functools.partial(_parse_licensed, config=config, ids_by_title=ids_by_title)):
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
        questions.append(dataclasses.replace(result, golden_answers=kept))
    return questions, rejects, notes


def _parse_licensed(row: Row, line: Line, *, config: ImportConfig, ids_by_title: IdsByTitle | None) -> LicensedQuestion:
    """A row of any known format, what it does not say filled in from the configuration."""
    own = to_own(row, f"{config.source or Path(config.input).name.split('.')[0]}-{line.number}")
    question = parse_question(own, ids_by_title)
    labels = {"source": question.source or config.source, "split": question.split or config.split}
    fields = {field.name: getattr(question, field.name) for field in dataclasses.fields(question)}
    return LicensedQuestion(**(fields | labels), license=_label(row, "license") or config.license)


def write_question_rows(path: Path, questions: Iterable[Question]) -> None:
    """Write our own format, which `megatron_sd.search.questions.load_questions` reads."""
    write_rows(path, (dataclasses.asdict(question) for question in questions))
