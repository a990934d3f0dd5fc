"""The numbers of a rollout as records hold them: an array that behaves like a tuple.

A step's rollouts lie on every rank. As Python's own numbers they would take 36 bytes a token id and 32 a
log-probability, here 4 and 8, and travel between ranks as bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

_LARGEST_ID = np.iinfo(np.int32).max


@functools.total_ordering
class Compact(Sequence[Any]):
    """Token ids (kept as int32) or float64. Never changes; equals, hashes, compares and adds up as the tuple of
    its numbers, which tuple() gives. For numpy it is the array that the tuple would be: int64 or float64."""

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

    def __lt__(self, other: Any) -> bool:
        return tuple(self) < tuple(other) if isinstance(other, Compact | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __add__(self, other: Any) -> Compact:
        added = self._alike(other)
        return NotImplemented if added is None else Compact(np.concatenate([self._values, added._values]))

    def __radd__(self, other: Any) -> Compact:
        added = self._alike(other)
        return NotImplemented if added is None else Compact(np.concatenate([added._values, self._values]))

    def _alike(self, other: Any) -> Compact | None:
        """The other's numbers, of the same kind; None for what a tuple does not add up with, arrays for one."""
        if not isinstance(other, Compact | tuple | list):
            return None
        made = compact_ids(other) if self._values.dtype.kind == "i" else compact_floats(other)
        return made if made._values.dtype == self._values.dtype else None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        usual = np.int64 if self._values.dtype.kind == "i" else np.float64
        return np.array(self._values, dtype=usual if dtype is None else dtype, copy=copy)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._values.tobytes(), self._values.dtype.str)


def compact_ids(ids: Sequence[int]) -> Compact:
    """Token ids, four bytes each; what is compact stays as it is. Raises ValueError for numbers that are no token
    ids: fractions, negative ones, 2^31 and more."""
    if isinstance(ids, Compact):
        return ids
    found = np.array(ids)
    is_whole = found.dtype.kind in "iu" and found.ndim == 1
    if len(found) and not (is_whole and found.min() >= 0 and found.max() <= _LARGEST_ID):
        raise ValueError(f"found {_shown(ids)} as token ids, expected whole numbers from 0 to {_LARGEST_ID}")
    return Compact(found.astype(np.int32))


def compact_floats(values: Sequence[float]) -> Compact:
    """Float64, so that nothing is lost of them. Raises ValueError for what is no number."""
    if isinstance(values, Compact):
        return values
    found = np.array(values)
    if len(found) and not (found.dtype.kind in "iuf" and found.ndim == 1):
        raise ValueError(f"found {_shown(values)} as log-probabilities, expected numbers")
    return Compact(found.astype(np.float64))


def as_fields(record: Any) -> dict[str, Any]:
    """A record's dataclasses.asdict, with tuples in the place of what is compact: ready for JSON."""
    return dataclasses.asdict(record, dict_factory=_plain)


def _shown(values: Any) -> str:
    text = str(values)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, Compact) else value for name, value in fields}


def _restored(stored: bytes, dtype: str) -> Compact:
    return Compact(np.frombuffer(stored, dtype=dtype))
