"""How an answer compares with the gold answers.

Two normalisations. `search_r1` is SQuAD's, as Search-R1 and its relatives use it: comparable with published
numbers, and with known quirks (see `normalize_search_r1`). `strict` mends them (see `normalize_strict`).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

Normalizer = Callable[[str], str]

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

_ARTICLES = re.compile(r"\b(a|an|the)\b")

_STRAIGHT_QUOTES = str.maketrans("‘’‚‛´`“”„‟«»", "''''''" + '"' * 6, "\ue000\ue001")

_DASHES = re.compile("[‐‑‒–—―−]")

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_MINUS = re.compile(r"(?:^|(?<=[\s(]))-(?=\.?\d)")

_DECIMAL_POINT = re.compile("(?:^|(?<=[\\s(\ue000\\d]))\\.(?=\\d)")

_KEPT_MARKS = {"\ue000": "-", "\ue001": "."}  # private-use stand-ins while punctuation is removed

_CLOSED_CLASS_ANSWERS = ("yes", "no", "noanswer")


def normalize_search_r1(text: str) -> str:
    """Lower case, drop ASCII punctuation, drop the articles a/an/the, squeeze white space, in this order
    (SQuAD's script).

    Quirks kept for comparability: "3.5" equals "35", "-5" equals "5", "The A" becomes empty, "café" differs
    from "cafe" and from its own decomposed form, curly quotes stay.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def normalize_strict(text: str) -> str:
    """Unicode-aware normalisation that keeps numbers apart.

    - NFKC and case folding: composed and decomposed forms, full-width letters and "STRASSE"/"straße" agree;
    diacritics still
      count ("café" is not "cafe").
    - A minus sign before a number and a decimal point inside one stay ("-5" is not "5", "3.5" is not "35");
    commas between
      thousands go ("1,000" equals "1000").
    - Every other punctuation mark or symbol goes: apostrophes and full stops without a trace ("U.S." equals
    "US"), the rest
      as a space ("Spider-Man" equals "spider man", "1990–1995" equals "1990-1995").
    - The articles a/an/the go, unless nothing else is left ("The A" stays "the a").
    """
    text = unicodedata.normalize("NFKC", text.translate(_STRAIGHT_QUOTES))
    text = unicodedata.normalize("NFKC", text.casefold())
    text = _THOUSANDS.sub("", _DASHES.sub("-", text))
    text = _DECIMAL_POINT.sub("\ue001", _MINUS.sub("\ue000", text))
    characters = "".join(_without_punctuation(character) for character in text)
    words = unicodedata.normalize("NFKC", characters).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _without_punctuation(character: str) -> str:
    if character in _KEPT_MARKS:
        return _KEPT_MARKS[character]
    if character in "'.":
        return ""
    return " " if unicodedata.category(character)[0] in "PSC" else character


NORMALIZERS: dict[str, Normalizer] = {"search_r1": normalize_search_r1, "strict": normalize_strict}


def empty_answers(golden_answers: Sequence[str]) -> list[str]:
    """The gold answers of which Search-R1's normalisation leaves nothing ("The", "!?"): an empty answer
    would match them."""
    return [gold for gold in golden_answers if not normalize_search_r1(gold)]


def exact_match(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """1.0 when the normalised answer equals a normalised gold answer, else 0.0 (Search-R1's EM)."""
    normalized = normalize(answer)
    return float(any(normalize(gold) == normalized for gold in golden_answers))


def sub_em(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """1.0 when a normalised gold answer occurs in the normalised answer, else 0.0 (Search-R1's substring EM).

    Under `search_r1` any substring counts ("Norway" contains "no"), under `strict` whole words only.
    """
    normalized = normalize(answer)
    golds = [normalize(gold) for gold in golden_answers]
    if normalize is normalize_strict:
        return float(any(gold and f" {gold} " in f" {normalized} " for gold in golds))
    return float(any(gold in normalized for gold in golds))


def token_f1(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """The best token F1 with any gold answer, in [0, 1]: harmonic mean of precision and recall over words
    as multisets.

    As HotpotQA's evaluation: when either side is yes, no or noanswer, only equality scores. An empty side
    scores 0.
    """
    normalized = normalize(answer)
    return max((_f1(normalized, normalize(gold)) for gold in golden_answers), default=0.0)


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _CLOSED_CLASS_ANSWERS or gold in _CLOSED_CLASS_ANSWERS):
        return 0.0
    answer_words, gold_words = answer.split(), gold.split()
    num_common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * num_common / (len(answer_words) + len(gold_words)) if num_common else 0.0


AnswerScore = Callable[[str, Sequence[str], Normalizer], float]

ANSWER_SCORES: dict[str, AnswerScore] = {"em": exact_match, "f1": token_f1, "sub_em": sub_em}
