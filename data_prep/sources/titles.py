"""Passage ids by title, also by titles as another dump or program wrote them."""

from __future__ import annotations

import html
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from megatron_sd.records import Passage


def normalize_title(title: str) -> str:
    """Entities decoded, composed characters, spaces for underscores, one space between words, no case."""
    text = unicodedata.normalize("NFC", html.unescape(title)).replace("_", " ")
    return " ".join(text.split()).casefold()


class Titles:
    """The ids of the passages of each title, in their order."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        """Takes about the memory of all ids and titles."""
        ids: dict[str, list[str]] = defaultdict(list)
        for passage in passages:
            ids[passage.title].append(passage.id)
        self._ids = {title: tuple(own) for title, own in ids.items()}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for title in self._ids:
            self._alike[normalize_title(title)].append(title)

    def find(self, title: str) -> tuple[str, ...]:
        """The ids of the exact title, else of the only one that normalises alike; empty where there is none
        or several."""
        if title in self._ids:
            return self._ids[title]
        alike = self._alike.get(normalize_title(title), [])
        return self._ids[alike[0]] if len(alike) == 1 else ()
