"""Stop strings on raw bytes: a table says which tokens can complete one, so that most steps look at no text
at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sd.search.tokens import TextCodec


def can_complete(token: bytes, stop: bytes) -> bool:
    """True when some text before the token makes `stop` end inside the token.

    >>> can_complete(b"h>\\n", b"</search>"), can_complete(b" >", b"</search>"), can_complete(b"search",
    b"</search>") (True, False, False)
    """
    return stop in token or any(token.startswith(stop[cut:]) for cut in range(1, len(stop)))


class StopTable:
    """Sets of stop strings by number. `lookup`: [sets, vocabulary] bool, True where a token can complete a
    string of the set."""

    def __init__(self, codec: TextCodec, vocabulary_size: int):
        self._codec = codec
        self._vocabulary_size = vocabulary_size
        self._numbers: dict[tuple[str, ...], int] = {}
        self._stops: list[list[bytes]] = []
        self.lookup = np.zeros((0, vocabulary_size), dtype=bool)

    def number(self, stop: tuple[str, ...]) -> int:
        """The number of a set; a new set is added."""
        if stop not in self._numbers:
            stops = [text.encode("utf-8") for text in stop]
            tokens = self._codec.token_bytes[: self._vocabulary_size]
            row = np.zeros((1, self._vocabulary_size), dtype=bool)
            row[0, : len(tokens)] = [any(s[-1:] in t and can_complete(t, s) for s in stops) for t in tokens]
            self.lookup = np.concatenate([self.lookup, row])
            self._stops.append(stops)
            self._numbers[stop] = len(self._stops) - 1
        return self._numbers[stop]

    def completed(self, number: int, ids: Sequence[int]) -> bool:
        """True when the last id of the completion `ids` completes a string of the set."""
        pieces = self._codec.pieces(ids)
        text, before = b"".join(pieces), sum(map(len, pieces[:-1]))
        return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in self._stops[number])

    def first_completed(self, number: int, ids: Sequence[int]) -> int | None:
        """Tokens of `ids` up to the first one that completes a string of the set, that one included; None
        when none does."""
        maybe = self.lookup[number, list(ids)].nonzero()[0].tolist()
        return next((place + 1 for place in maybe if self.completed(number, ids[: place + 1])), None)
