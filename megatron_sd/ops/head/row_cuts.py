"""Cutting rows into parts, with the query rows that lie in each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """Consecutive rows, and the query rows that lie among them."""

    rows: slice
    queries: slice


def cut_rows(num_rows: int, query_rows: np.ndarray, size: int) -> list[Cut]:
    """Cut num_rows rows, `size` at a time; query_rows [Q] are increasing row numbers. At least one cut,
    possibly empty.

    >>> cut_rows(5, np.array([1, 3, 4]), 3) [Cut(rows=slice(0, 3, None), queries=slice(0, 1, None)),
    Cut(rows=slice(3, 5, None), queries=slice(1, 3, None))]
    """
    bounds = [(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size)]
    return [
        Cut(slice(a, b), slice(*(int(np.searchsorted(query_rows, row)) for row in (a, b)))) for a, b in bounds
    ]
