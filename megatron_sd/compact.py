"""The numbers of a rollout as records hold them: an array that behaves like a tuple.

A step's rollouts lie on every rank. As Python's own numbers they would take 36 bytes a token id and 32 a
log-probability, here 4 and 8, and travel between ranks as bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class Compact(Sequence[Any]):
    """Never changes, equals and hashes as the tuple of its numbers. It adds up with tuples, and numpy takes it
    as the array that it is."""

    __slots__ = ("_values",)

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._values.flags.writeable = False

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: Any) -> Any:
        found = self._values[place]
        return Compact(found) if isinstance(place, slice) else found.item()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Compact):
            return np.array_equal(self._values, other._values)
        return tuple(self) == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __add__(self, other: Sequence[Any]) -> Compact:
        return Compact(np.concatenate([self._values, np.asarray(other, dtype=self._values.dtype)]))

    def __radd__(self, other: Sequence[Any]) -> Compact:
        return Compact(np.concatenate([np.asarray(other, dtype=self._values.dtype), self._values]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._values.tobytes(), self._values.dtype.str)


def compact_ids(ids: Sequence[int]) -> Compact:
    """Token ids, four bytes each; what is compact stays as it is. Raises OverflowError for one that no
    vocabulary holds (2^31 and more)."""
    return ids if isinstance(ids, Compact) else Compact(np.array(ids, dtype=np.int32))


def compact_floats(values: Sequence[float]) -> Compact:
    """Float64, so that nothing is lost of them."""
    return values if isinstance(values, Compact) else Compact(np.array(values, dtype=np.float64))


def as_fields(record: Any) -> dict[str, Any]:
    """A record's dataclasses.asdict, with tuples in the place of what is compact: ready for JSON."""
    return dataclasses.asdict(record, dict_factory=_plain)


def _plain(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, Compact) else value for name, value in fields}


def _restored(stored: bytes, dtype: str) -> Compact:
    return Compact(np.frombuffer(stored, dtype=dtype))
