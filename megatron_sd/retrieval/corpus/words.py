"""Words of a text by a regular expression, and whether one suits scripts that put no spaces between words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sd.errors import ConfigError

_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_LONG_WORD = 4  # characters a word on average: a Chinese word has one or two, a Thai one about four


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A `token_pattern`, whose matches are the words. Raises ConfigError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"token_pattern: found {pattern!r} ({error}), expected a regular expression"
        ) from error
    if compiled.groups:
        raise ConfigError(
            f"token_pattern: found {pattern!r} with {compiled.groups} groups, expected none: its whole match"
            " is the word; write (?:...)"
        )
    if compiled.fullmatch(""):
        raise ConfigError(
            f"token_pattern: found {pattern!r}, which matches no text at all, expected one that needs a"
            " character"
        )
    return compiled


def is_uncut(text: str, words: Sequence[str]) -> bool:
    """Whether a text mainly in Chinese, Japanese, Thai or a script like them came out as whole clauses
    instead of `words`."""
    num_characters = len(_UNSPACED.findall(text))
    if 2 * num_characters <= len(text):
        return False
    return num_characters > _LONG_WORD * max(1, sum(1 for word in words if _UNSPACED.search(word)))
