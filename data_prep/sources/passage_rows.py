"""Rows of public passage files, each turned into a passage.

An id may be called `id`, or as in BEIR, KILT, TREC and DPR; a text `text` (a string, or KILT's list of
paragraphs) or `contents`. `contents` have a title of their own only when no `title` stands beside them and
their first line looks like one: see `split_title`. No word is lost either way: what is no title is text.
"""

from __future__ import annotations

import re

from data_prep.sources.jsonl import Row, RowError, id_field
from megatron_sd.records import Passage

_IDS = ("id", "_id", "docid", "doc_id", "pid", "docno", "passage_id", "wikipedia_id")
_TITLES = ("title", "wikipedia_title")
_TEXTS = ("contents", "text")
_MAX_TITLE_CHARACTERS = 200
_MAX_SENTENCE_TITLE_WORDS = 6  # "Who's Afraid of Virginia Woolf?", "Apple Inc."
_SENTENCE_END = re.compile(r"[.!?;:,。！？][\"'”’)\]]*$")


def parse_passage(row: Row) -> Passage:
    """One row of any accepted form. A passage with a title and an empty text has its title as text. Raises
    RowError."""
    row = lower_names(row, (*_IDS, *_TITLES, *_TEXTS))
    name = next((name for name in _TEXTS if name in row), "text")
    title, text = _title(row), _text(row, name)
    if name == "contents":
        title, text = split_title(text) if title is None else (title, _without_title(text, title))
    title = " ".join((title or "").splitlines())
    text = text if text.strip() else title
    if not text.strip():
        raise RowError(
            f"field {name!r} is {row.get(name)!r}, expected a non-empty string, or a title beside it"
        )
    passage = Passage(
        id=id_field(row, next((name for name in _IDS if row.get(name) is not None), "id")),
        title=title,
        text=text,
    )
    for name, value in vars(passage).items():
        if "\0" in value:
            raise RowError(f"field {name!r} holds a NUL character, expected text")
    return passage


def lower_names(row: Row, names: tuple[str, ...]) -> Row:
    """The row with fields such as `ID` or `Title` under their usual names, where it has those names in no
    other way."""
    found = {name.strip().lower(): name for name in row if isinstance(name, str)}
    return row | {name: row[found[name]] for name in names if name not in row and name in found}


def split_title(contents: str) -> tuple[str, str]:
    """(title, text) of Search-R1's, FlashRAG's and Pyserini's `contents`.

    A first line in double quotes is a title. So is a bare first line that reads as one: at most 200
    characters, and no sentence (more than six words that end with a punctuation mark). Everything else is
    text without title, also contents of one line.
    """
    first, has_more, rest = contents.partition("\n")
    first = first.strip()
    is_quoted = len(first) > 2 and first[0] == first[-1] == '"'
    if is_quoted and (has_more or '"' not in first[1:-1]):
        return first[1:-1], rest
    is_sentence = _SENTENCE_END.search(first) and len(first.split()) > _MAX_SENTENCE_TITLE_WORDS
    if not has_more or not first or not rest.strip() or len(first) > _MAX_TITLE_CHARACTERS or is_sentence:
        return "", contents
    return first, rest


def _without_title(contents: str, title: str) -> str:
    """The contents less a first line that repeats the title which stands beside them."""
    first, _, rest = contents.partition("\n")
    return rest if rest.strip() and first.strip() in (title, f'"{title}"') else contents


def _title(row: Row) -> str | None:
    title = next((row[name] for name in _TITLES if row.get(name) is not None), None)
    if not isinstance(title, str | None):
        raise RowError(f"field 'title' is {title!r}, expected a string")
    return title


def _text(row: Row, name: str) -> str:
    text = row.get(name)
    if name == "text" and isinstance(text, list) and all(isinstance(part, str) for part in text):
        return "".join(text[1:] if text and text[0].strip() == _title(row) else text).strip()
    if not isinstance(text, str) and not (text is None and name in row and _title(row)):
        raise RowError(f"field {name!r} is {text!r}, expected a non-empty string")
    return text or ""
