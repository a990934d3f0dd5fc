"""BEIR's folders: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. Queries have no answers, but judged
documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_prep.sources.jsonl import Row, RowError, id_field
from data_prep.sources.rows import read_rows
from megatron_sd.errors import DataError

_FILES = {"passages": "corpus.jsonl", "questions": "queries.jsonl"}

Judged = Mapping[str, tuple[str, tuple[str, ...]]]  # query id -> split, ids of the relevant documents


def file_of(path: Path, kind: str) -> Path:
    """The file of a BEIR folder that holds passages or questions; any other path as it is."""
    is_folder = path.is_dir() and all((path / name).is_file() for name in _FILES.values())
    return path / _FILES[kind] if is_folder else path


def read_judged(path: Path) -> Judged | None:
    """The judgements beside a file of queries, None where there are none. Raises DataError for a broken
    line."""
    files = sorted((path.parent / "qrels").glob("*.tsv"))
    judged: dict[str, tuple[str, tuple[str, ...]]] = {}
    for file in files:
        for line, row in read_rows(file):
            try:
                if isinstance(row, RowError):
                    raise row
                query, document, score = row["query-id"], row["corpus-id"], float(row["score"])
            except (RowError, KeyError, ValueError) as error:
                raise DataError(
                    f"{file}:{line.number}: {error}; expected the columns query-id, corpus-id, score"
                ) from error
            if score > 0:
                split, documents = judged.get(query, (file.stem, ()))
                judged[query] = (split, tuple(dict.fromkeys((*documents, document))))
    return judged if files else None


def judged_query(row: Row, judged: Judged) -> Row:
    """A query as a question without gold answers, a hop for each relevant document. Raises RowError for one
    without any."""
    id_ = id_field(row, "_id")
    if id_ not in judged:
        raise RowError(
            f"query {id_!r} has no relevant document in qrels/, and BEIR has no answers: nothing to measure"
            " with"
        )
    split, documents = judged[id_]
    return {
        "id": id_,
        "question": row.get("text"),
        "golden_answers": [],
        "split": split,
        "supporting": [[own] for own in documents],
    }
