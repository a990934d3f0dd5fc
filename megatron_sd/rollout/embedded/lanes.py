"""What the engine knows about each row while it decodes, as arrays: one decode step costs no Python work
per row."""

from __future__ import annotations

import numpy as np

from megatron_sd.records import TokenIds

_BLOCK = 64


class Lanes:
    """Arrays over rows, [max_rows]. A lane is active while it samples; otherwise its row is free or parked
    between two turns.

    length: tokens of the conversation that are cached; the first `shared` of them in row `prompt_row` of
    the shared prompts, the others in its own row. next_id: sampled but not yet fed. count: tokens sampled
    in this turn; ids, logprobs: [max_rows, width] of this turn, the first `count` of a lane are filled.
    """

    def __init__(self, max_rows: int):
        self.active = np.zeros(max_rows, dtype=bool)
        self.length = np.zeros(max_rows, dtype=np.int64)
        self.shared = np.zeros(max_rows, dtype=np.int64)
        self.prompt_row = np.zeros(max_rows, dtype=np.int64)
        self.next_id = np.zeros(max_rows, dtype=np.int64)
        self.count = np.zeros(max_rows, dtype=np.int64)
        self.max_new = np.zeros(max_rows, dtype=np.int64)
        self.temperature = np.zeros(max_rows, dtype=np.float32)
        self.seed = np.zeros(max_rows, dtype=np.int64)
        self.stop_set = np.zeros(max_rows, dtype=np.int64)
        self.ids = np.zeros((max_rows, _BLOCK), dtype=np.int64)
        self.logprobs = np.zeros((max_rows, _BLOCK), dtype=np.float32)

    def start(
        self, row: int, *, length: int, max_new: int, temperature: float, seed: int, stop_set: int
    ) -> None:
        """Begin a turn of a conversation of which `length` tokens are cached (0: afresh): nothing sampled
        yet."""
        self.active[row], self.count[row], self.length[row] = True, 0, length
        if length == 0:
            self.shared[row] = 0
        self.max_new[row], self.temperature[row], self.seed[row], self.stop_set[row] = (
            max_new,
            temperature,
            seed,
            stop_set,
        )

    def append(self, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """One sampled token per row."""
        count = self.count[rows]
        if count.max() >= self.ids.shape[1]:
            self.ids, self.logprobs = (
                np.pad(a, ((0, 0), (0, a.shape[1]))) for a in (self.ids, self.logprobs)
            )
        self.ids[rows, count], self.logprobs[rows, count] = ids, logprobs
        self.count[rows] = count + 1
        self.next_id[rows] = ids

    def completion(self, row: int) -> tuple[TokenIds, tuple[float, ...]]:
        """Ids and log-probabilities sampled so far in this turn."""
        count = self.count[row]
        return tuple(self.ids[row, :count].tolist()), tuple(self.logprobs[row, :count].tolist())

    def move(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Row targets[i] becomes what row sources[i] was, in every array."""
        for array in vars(self).values():
            array[targets] = array[sources]
