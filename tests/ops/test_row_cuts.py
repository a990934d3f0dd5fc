"""Rows in parts, with the query rows of each."""

import numpy as np

from megatron_sd.ops.head.row_cuts import Cut, cut_rows


def test_cuts_cover_rows_and_query_rows():
    cuts = cut_rows(10, np.array([0, 3, 4, 9]), 4)
    assert cuts == [
        Cut(slice(0, 4), slice(0, 2)),
        Cut(slice(4, 8), slice(2, 3)),
        Cut(slice(8, 10), slice(3, 4)),
    ]
    assert cut_rows(0, np.zeros(0), 4) == [Cut(slice(0, 0), slice(0, 0))]
