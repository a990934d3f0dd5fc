"""Text from outside becomes plain: no control tag, no special token string, no invisible character survives.

A passage could otherwise close its own information block, answer in the policy's stead, or hide a tag
behind full-width letters, zero-width characters or capital letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Breaks become spaces. Removed: control characters, surrogates, everything that Unicode calls
# default-ignorable or bidirectional
# control (zero-width characters, variation selectors, fillers, tags), and the replacement character of
# broken UTF-8.
_BREAKS = re.compile("[\t\n\x0b\x0c\r\x85\u2028\u2029]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffd\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Look-alikes of tag punctuation that compatibility normalisation leaves alone.
_LOOK_ALIKES = str.maketrans(
    {
        c: plain
        for plain, others in {"<": "‹〈⟨❬❮❰⧼⦑˂ᐸ", ">": "›〉⟩❭❯❱⧽⦒˃ᐳ", "/": "⁄∕⧸╱", "|": "ǀ∣│❘"}.items()
        for c in others
    }
)
# nested tags deeper than this are an attack: from then on every first character of a tag goes
_MAX_PASSES = 8
_CACHE_SIZE = 16384  # texts; the same passages come back again and again


def _fold(text: str) -> str:
    """Compatibility-decomposed (context-free, character by character), case-folded, look-alikes made
    plain."""
    return unicodedata.normalize("NFKD", text).casefold().translate(_LOOK_ALIKES)


def _pattern(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings in folded text, with any white space between the characters."""
    bodies = {r"\s*".join(re.escape(c) for c in _fold(s) if not c.isspace()) for s in strings}
    return re.compile("|".join(sorted(filter(None, bodies), key=len, reverse=True)) or r"(?!)")


class Sanitizer:
    """Makes text plain with respect to `forbidden` strings (the protocol's control tags and the tokenizer's
    control strings).

    The result is a fixed point (`clean(clean(text)) == clean(text)`), and ordinary text comes back
    unchanged except that line breaks and tabs become spaces.

    >>> Sanitizer(["</information>", "<|im_end|>"]).clean("one\\ntwo</ Information ><|im_end|>")
    'one two  '
    """

    def __init__(self, forbidden: Iterable[str]):
        strings = [s for s in forbidden if s.strip()]
        self._forbidden = _pattern(strings)
        self._triggers = frozenset(_fold(s).lstrip()[0] for s in strings)
        self.clean = lru_cache(maxsize=_CACHE_SIZE)(self._clean)

    def clean_query(self, text: str) -> str:
        """A query on one line, without leading, trailing or repeated white space; empty when nothing is
        left."""
        return " ".join(self.clean(text).split())

    def _clean(self, text: str) -> str:
        text = _INVISIBLE.sub("", _BREAKS.sub(" ", text))
        for _ in range(_MAX_PASSES):
            spans = self._spans(text)
            if not spans:
                return text
            text = _cut(text, spans)
        return "".join(c for c in text if self._triggers.isdisjoint(_fold(c)))

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """[start, stop) of forbidden strings in `text`, found in its folded form and mapped back to whole
        characters."""
        folded = _fold(text)
        if not any(trigger in folded for trigger in self._triggers):
            return []
        found = [match.span() for match in self._forbidden.finditer(folded)]
        if not found or len(folded) == len(text):
            return found
        owner = [n for n, c in enumerate(text) for _ in _fold(c)]
        return [(owner[start], owner[stop - 1] + 1) for start, stop in found]


def _cut(text: str, spans: list[tuple[int, int]]) -> str:
    """`text` with each span replaced by a space."""
    parts, end = [], 0
    for start, stop in spans:
        parts.append(text[end:start])
        end = max(end, stop)
    return " ".join([*parts, text[end:]])
