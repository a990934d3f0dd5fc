"""Native question formats of public data sets, each turned into a row of our own form.

A format is recognised by the fields its rows have. Supporting passages are known by title only: they count
when the import is given the passages to look them up in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.sources.golds import UnanswerableError, read_golds
from data_prep.sources.jsonl import Row, RowError
from data_prep.sources.passage_rows import lower_names


@dataclass(frozen=True, kw_only=True)
class QuestionFormat:
    """The fields that tell a format, and how its rows become our own: id, question, golden_answers,
    supporting_titles."""

    source: str  # the data set's name, where rows do not say it
    fields: frozenset[str]
    convert: Callable[[Row], Row]


def to_own(row: Row, place: str, source: str = "") -> Row:
    """A row of our own form; `place` becomes the id where the data set has none.

    The label is the row's own, else `source`, else the format's name; so is the split the row's own. Raises
    RowError for an unknown format.
    """
    found = _format_of(row)
    if found is None:
        row = lower_names(row, ("id", "question", "answer", "golden_answers", "answers"))
        found = _format_of(row)
    if found is None:
        raise RowError(
            f"no known format has the fields {sorted(row)}; expected those of our own form or of a supported"
            " data set"
        )
    try:
        own = found.convert(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(f"not of the form its fields promise ({type(error).__name__}: {error})") from error
    label = next(
        (row[name] for name in ("source", "dataset", "data_source") if row.get(name) is not None),
        source or found.source,
    )
    own = {name: value for name, value in own.items() if value is not None}
    split = own.get("split", row.get("split", _dict(row.get("extra_info")).get("split")))
    known = (
        {"id": place} | ({"source": label} if label else {}) | ({"split": split} if split is not None else {})
    )
    return (
        known
        | own
        | ({"source": label.removeprefix("searchR1_")} if isinstance(label, str) and label else {})
    )


def _format_of(row: Row) -> QuestionFormat | None:
    return next((known for known in FORMATS if known.fields <= row.keys()), None)


def _dict(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _decoded(value: Any) -> Any:
    """What a string holds as JSON (Parquet files of the hub have columns of it); anything else as it is."""
    return json.loads(value) if isinstance(value, str) else value


def _own(row: Row) -> Row:
    """Our own form, Search-R1's, FlashRAG's: the titles of hops may stand in `metadata`."""
    own = dict(row)
    facts = _dict(_metadata(row)).get("supporting_facts")
    return own | ({"supporting_titles": _titles(facts)} if facts and not row.get("supporting") else {})


def _metadata(row: Row) -> Any:
    value = row.get("metadata")
    return _decoded(value) if isinstance(value, str) and value.strip().startswith("{") else value


def _verl(row: Row) -> Row:
    """verl's rows: the question in `extra_info`, or at the end of the prompt; the golds in `reward_model`."""
    question = _dict(row.get("extra_info")).get("question") or row.get("question")
    if question is None:
        prompt = (
            row["prompt"]
            if isinstance(row["prompt"], str)
            else [own for own in row["prompt"] if own["role"] == "user"][-1]["content"]
        )
        _, mark, question = prompt.rpartition("Question:")
        if not mark:
            raise RowError("the prompt has no 'Question:' and extra_info no 'question'; expected one of them")
    return _row(
        row.get("id"), question.strip().split("<|im_end|>")[0].strip(), row["reward_model"]["ground_truth"]
    )


def _kilt(row: Row) -> Row:
    """KILT: answers and their provenance, of which the first that has any gives the hops."""
    golds = [own["answer"] for own in row["output"] if own.get("answer")]
    pages = next((own["provenance"] for own in row["output"] if own.get("provenance")), [])
    return _row(row["id"], row["input"], golds, [page["title"] for page in pages if page.get("title")])


def _answers(row: Row) -> Row:
    """DPR, FiD, Atlas, WebQuestions."""
    return _row(row.get("id", row.get("_id")), row["question"], row["answers"])


def _titles(facts: Any) -> list[str]:
    """Titles of [[title, sentence], ...] or {"title": [...], ...}, either perhaps as JSON in a string."""
    facts = _decoded(facts)
    titles = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    return list(dict.fromkeys(titles))


def _hotpotqa(row: Row) -> Row:
    """HotpotQA and 2Wiki: `supporting_facts` is [[title, sentence], ...], or {"title": [...], ...} from the
    Hugging Face hub."""
    return _row(
        row.get("_id", row.get("id")), row["question"], row["answer"], _titles(row["supporting_facts"])
    )


def _musique(row: Row) -> Row:
    """MuSiQue: one supporting paragraph for each step of the decomposition."""
    if row.get("answerable") is False:
        raise UnanswerableError(
            "answerable is false: the question's evidence was taken out; expected an answerable one"
        )
    titles = {paragraph["idx"]: paragraph["title"] for paragraph in row["paragraphs"]}
    steps = [step["paragraph_support_idx"] for step in row["question_decomposition"]]
    hops = [titles[step] for step in steps if step is not None]
    return _row(row["id"], row["question"], [row["answer"], *row.get("answer_aliases", [])], hops)


def _nq_open(row: Row) -> Row:
    return _row(row.get("id"), row["question"], row["answer"])


def _triviaqa(row: Row) -> Row:
    """TriviaQA, as published (`QuestionId`, `Answer`) and as on the Hugging Face hub (`question_id`,
    `answer`)."""
    lower = {name.lower().replace("_", ""): value for name, value in row.items()}
    answer = {name.lower(): value for name, value in lower["answer"].items()}
    return _row(lower["questionid"], lower["question"], [answer["value"], *answer.get("aliases", [])])


def _popqa(row: Row) -> Row:
    """PopQA: `possible_answers` is a JSON list, in a string."""
    answers = row["possible_answers"]
    if isinstance(answers, str) and not answers.strip().startswith("["):
        answers = json.loads(answers)
    return _row(row["id"], row["question"], answers)


def _bamboogle(row: Row) -> Row:
    return _row(None, row["Question"], row["Answer"])


def _row(id_: Any, question: Any, golds: Any, titles: Iterable[str] = ()) -> Row:
    own = {"id": id_, "question": question, "golden_answers": read_golds(golds)}
    return own | {"supporting_titles": list(dict.fromkeys(titles))}


def _known(source: str, fields: str, convert: Callable[[Row], Row]) -> QuestionFormat:
    return QuestionFormat(source=source, fields=frozenset(fields.split()), convert=convert)


FORMATS = (  # the first whose fields a row has
    _known("", "golden_answers", _own),  # our own, Search-R1's and FlashRAG's
    _known("", "prompt reward_model", _verl),
    _known("kilt", "input output", _kilt),
    _known("musique", "question answer paragraphs question_decomposition", _musique),
    _known("2wikimultihopqa", "question answer supporting_facts evidences", _hotpotqa),
    _known("hotpotqa", "question answer supporting_facts", _hotpotqa),
    _known("popqa", "id question possible_answers", _popqa),
    _known("triviaqa", "Question QuestionId Answer", _triviaqa),
    _known("triviaqa", "question question_id answer", _triviaqa),
    _known("bamboogle", "Question Answer", _bamboogle),
    _known("nq", "question answer", _nq_open),
    _known("", "question answers", _answers),
)
