"""Native question formats of public data sets, each turned into a row of our own form.

A format is recognised by the fields its rows have. Supporting passages are known by title only: they count when the import is
given the passages to look them up in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.jsonl import Row, RowError


@dataclass(frozen=True, kw_only=True)
class QuestionFormat:
    """The fields that tell a format, and how its rows become our own: id, question, golden_answers, supporting_titles."""

    source: str  # the data set's name, where rows do not say it
    fields: frozenset[str]
    convert: Callable[[Row], Row]


def to_own(row: Row, place: str) -> Row:
    """A row of our own form; `place` becomes the id where the data set has none. Raises RowError for an unknown format."""
    found = next((known for known in FORMATS if known.fields <= row.keys()), None)
    if found is None:
        raise RowError(f"no known format has the fields {sorted(row)}; expected those of our own form or of a supported data set")
    try:
        own = found.convert(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RowError(f"not of the form its fields promise ({type(error).__name__}: {error})") from error
    known = {"id": place} | ({"source": found.source} if found.source else {})
    return known | {name: value for name, value in own.items() if value is not None}


def _own(row: Row) -> Row:
    return dict(row)


def _hotpotqa(row: Row) -> Row:
    """HotpotQA and 2Wiki: `supporting_facts` is [[title, sentence], ...], or {"title": [...], ...} from the Hugging Face hub."""
    facts = row["supporting_facts"]
    titles = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    return _row(row.get("_id", row.get("id")), row["question"], [row["answer"]], titles)


def _musique(row: Row) -> Row:
    """MuSiQue: one supporting paragraph for each step of the decomposition."""
    titles = {paragraph["idx"]: paragraph["title"] for paragraph in row["paragraphs"]}
    steps = [step["paragraph_support_idx"] for step in row["question_decomposition"]]
    hops = [titles[step] for step in steps if step is not None]
    return _row(row["id"], row["question"], [row["answer"], *row.get("answer_aliases", [])], hops)


def _nq_open(row: Row) -> Row:
    answers = row["answer"]
    return _row(row.get("id"), row["question"], [answers] if isinstance(answers, str) else answers)


def _triviaqa(row: Row) -> Row:
    """TriviaQA, as published (`QuestionId`, `Answer`) and as on the Hugging Face hub (`question_id`, `answer`)."""
    lower = {name.lower().replace("_", ""): value for name, value in row.items()}
    answer = {name.lower(): value for name, value in lower["answer"].items()}
    return _row(lower["questionid"], lower["question"], [answer["value"], *answer.get("aliases", [])])


def _popqa(row: Row) -> Row:
    """PopQA: `possible_answers` is a JSON list, in a string."""
    answers = row["possible_answers"]
    return _row(str(row["id"]), row["question"], json.loads(answers) if isinstance(answers, str) else answers)


def _bamboogle(row: Row) -> Row:
    return _row(None, row["Question"], [row["Answer"]])


def _row(id_: Any, question: Any, golds: Iterable[Any], titles: Iterable[str] = ()) -> Row:
    own = {"id": id_, "question": question, "golden_answers": list(golds)}
    return own | {"supporting_titles": list(dict.fromkeys(titles))}


def _known(source: str, fields: str, convert: Callable[[Row], Row]) -> QuestionFormat:
    return QuestionFormat(source=source, fields=frozenset(fields.split()), convert=convert)


FORMATS = (  # the first whose fields a row has
    _known("", "golden_answers", _own),  # our own, Search-R1's and FlashRAG's
    _known("musique", "question answer paragraphs question_decomposition", _musique),
    _known("2wikimultihopqa", "question answer supporting_facts evidences", _hotpotqa),
    _known("hotpotqa", "question answer supporting_facts", _hotpotqa),
    _known("popqa", "id question possible_answers", _popqa),
    _known("triviaqa", "Question QuestionId Answer", _triviaqa),
    _known("triviaqa", "question question_id answer", _triviaqa),
    _known("bamboogle", "Question Answer", _bamboogle),
    _known("nq", "question answer", _nq_open),
)
