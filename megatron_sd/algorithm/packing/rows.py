"""A microbatch's sequences one after the other in one row, without padding.

packed: every sequence whole. shared: a beginning that several sequences have in common is there once, followed
by what each of them goes on with; a group's rollouts share their prompt, and the teacher's continuations
theirs. Positions are those that a token has in its own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_sd.records import Microbatch


class RowPart(NamedTuple):
    """Neighbouring tokens of a row. They see those before them in their part, and all of part number `after`,
    which comes earlier in the row; None: they begin a sequence."""

    length: int
    after: int | None


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """ids, positions: [1, T] int64. parts: they fill the row in order. rows: [R] int64, the positions in the
    row that are asked for."""

    ids: np.ndarray
    positions: np.ndarray
    parts: tuple[RowPart, ...]
    rows: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """[P + 1] int32: where each of the P parts begins, and T."""
        return np.cumsum([0, *(part.length for part in self.parts)]).astype(np.int32)

    @cached_property
    def key_starts(self) -> np.ndarray:
        """[P + 1] int32: the same in a list of all that each part sees; `starts` where nothing is shared."""
        return np.cumsum([0, *map(self._num_seen, self.parts)]).astype(np.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest part."""
        return max(part.length for part in self.parts)

    @property
    def most_seen(self) -> int:
        """Tokens that any part sees, its own included."""
        return max(map(self._num_seen, self.parts))

    @property
    def keys(self) -> np.ndarray | None:
        """That list: [K] int64 positions in the row. None where it is the row itself."""
        if all(part.after is None for part in self.parts):
            return None
        spans = [np.arange(*self.starts[number : number + 2]) for number in range(len(self.parts))]
        seen = [
            own if part.after is None else np.concatenate([spans[part.after], own])
            for part, own in zip(self.parts, spans, strict=True)
        ]
        return np.concatenate(seen).astype(np.int64)

    def _num_seen(self, part: RowPart) -> int:
        return part.length + (0 if part.after is None else self.parts[part.after].length)


def student_row(microbatch: Microbatch) -> PackedRow:
    """The student's sequences."""
    m = microbatch
    sequences = [ids[:length] for ids, length in zip(m.input_ids, m.lengths)]
    numbers, columns = np.divmod(m.row_index, m.input_ids.shape[1])
    return _row(sequences, m.prompt_lengths if m.layout == "shared" else None, numbers, columns)


def teacher_row(microbatch: Microbatch) -> PackedRow:
    """What the teacher reads, which must be something: each continuation after its prompt."""
    m = microbatch
    prompt_lengths = m.teacher_prompt_lengths[m.teacher_prompt_of]
    prompts = [
        m.teacher_prompts[number, :length] for number, length in zip(m.teacher_prompt_of, prompt_lengths)
    ]
    own = [ids[:length] for ids, length in zip(m.teacher_ids, m.teacher_lengths)]
    sequences = [np.concatenate(pair) for pair in zip(prompts, own, strict=True)]
    numbers, columns = np.divmod(m.teacher_rows, m.teacher_ids.shape[1])
    openings = prompt_lengths if m.layout == "shared" else None
    return _row(sequences, openings, numbers, prompt_lengths[numbers] + columns)


def _row(
    sequences: Sequence[np.ndarray], openings: np.ndarray | None, numbers: np.ndarray, columns: np.ndarray
) -> PackedRow:
    """openings: [N] the first tokens of each sequence that others may share; None: nobody shares. numbers,
    columns: [R] the sequences that rows lie in, and where."""
    parts: list[RowPart] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    end = 0

    def add(tokens: np.ndarray, first_position: int, after: int | None) -> int:
        """Append a part; where it begins."""
        nonlocal end
        if len(tokens):
            parts.append(RowPart(len(tokens), after))
            ids.append(tokens)
            positions.append(np.arange(first_position, first_position + len(tokens)))
        end += len(tokens)
        return end - len(tokens)

    # of each sequence: the tokens that it shares, where they begin, and where it would begin itself
    shared, opening_starts, own_starts = (np.zeros(len(sequences), np.int64) for _ in range(3))
    for members in _with_one_opening(sequences, openings):
        length = 0 if openings is None or len(members) == 1 else int(openings[members[0]])
        opening_start = add(sequences[members[0]][:length], 0, None)
        opening = len(parts) - 1 if length else None
        for number in members:
            own_start = add(sequences[number][length:], length, opening)
            shared[number], opening_starts[number] = length, opening_start
            own_starts[number] = own_start - length
    return PackedRow(
        ids=np.concatenate(ids)[None],
        positions=np.concatenate(positions)[None],
        parts=tuple(parts),
        rows=np.where(columns < shared[numbers], opening_starts[numbers], own_starts[numbers]) + columns,
    )


def _with_one_opening(sequences: Sequence[np.ndarray], openings: np.ndarray | None) -> list[list[int]]:
    """Numbers of sequences, those with the same opening together."""
    if openings is None:
        return [[number] for number in range(len(sequences))]
    together: dict[bytes, list[int]] = {}
    for number, (sequence, opening) in enumerate(zip(sequences, openings, strict=True)):
        together.setdefault(sequence[:opening].tobytes(), []).append(number)
    return list(together.values())
