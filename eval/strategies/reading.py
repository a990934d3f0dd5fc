"""How a model's own words are read: what stands between two marks, after a word, or first on a line."""

from __future__ import annotations

import re

ANSWER_TAGS = ("<answer>", "</answer>")
ANSWER_REQUEST = (
    "Give the answer alone, a few words, between <answer> and </answer>, for example <answer> Beijing"
    " </answer>."
)


def between(text: str, opening: str, closing: str) -> str | None:
    """What stands before the first closing mark that has an opening one before it, from the last such
    opening; None without.

    >>> between("so <answer> a <answer>b</answer>", "<answer>", "</answer>")
    'b'
    """
    start = text.find(opening)
    stop = text.find(closing, start + len(opening)) if start >= 0 else -1
    return text[text.rfind(opening, 0, stop) + len(opening) : stop].strip() if stop >= 0 else None


def answer_of(text: str) -> str | None:
    """What stands in the answer tags, None when they are not closed."""
    return between(text, *ANSWER_TAGS)


def after(text: str, words: str) -> str | None:
    """The rest of the line after the first `words` (case ignored), without the full stop that ends it; None
    without them.

    >>> after("Hence the answer is: U.S.A. \\nQuestion:", "answer is:")
    'U.S.A'
    """
    match = re.search(re.escape(words) + r"[ \t]*([^\n]*)", text, re.IGNORECASE)
    return match[1].strip().removesuffix(".").strip() if match else None
