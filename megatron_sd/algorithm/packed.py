"""A microbatch's sequences one after the other in one row, without padding.

Positions begin anew with every sequence, which is how attention keeps them apart: flash attention by the
sequences' starts, transformers' other kinds by a mask that they make of the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_sd.records import Microbatch


class PackedRow(NamedTuple):
    """ids, positions: [1, T] int64. starts: [N + 1] int32, where each of the N sequences begins, and T.
    longest: the longest's tokens. rows: [R] int64, the positions in the row that are asked for."""

    ids: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    longest: int
    rows: np.ndarray


def student_row(microbatch: Microbatch) -> PackedRow:
    """The student's sequences."""
    m = microbatch
    return _packed(
        [ids[:length] for ids, length in zip(m.input_ids, m.lengths)], m.row_index, m.input_ids.shape[1], 0
    )


def teacher_row(microbatch: Microbatch) -> PackedRow:
    """What the teacher reads, which must be something: each continuation with its whole prompt before it."""
    m = microbatch
    prompt_lengths = m.teacher_prompt_lengths[m.teacher_prompt_of]
    prompts = [
        m.teacher_prompts[number, :length] for number, length in zip(m.teacher_prompt_of, prompt_lengths)
    ]
    own = [ids[:length] for ids, length in zip(m.teacher_ids, m.teacher_lengths)]
    sequences = [np.concatenate(pair) for pair in zip(prompts, own, strict=True)]
    return _packed(sequences, m.teacher_rows, m.teacher_ids.shape[1], prompt_lengths)


def _packed(
    sequences: Sequence[np.ndarray], flat_rows: np.ndarray, width: int, before: np.ndarray | int
) -> PackedRow:
    """flat_rows: number * width + column of the padded sequences, of which the packed ones have `before`
    more tokens in front."""
    lengths = np.array([len(sequence) for sequence in sequences])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    numbers, columns = np.divmod(flat_rows, width)
    return PackedRow(
        ids=np.concatenate(sequences)[None],
        positions=np.concatenate([np.arange(length) for length in lengths])[None],
        starts=starts.astype(np.int32),
        longest=int(lengths.max()),
        rows=(starts[:-1] + before)[numbers] + columns,
    )
