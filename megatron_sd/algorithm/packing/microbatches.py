"""The arrays of a microbatch, and parts of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.records import Microbatch, TrainingSample

RowWeight = Callable[[int], float]  # what each of a rollout's so many sampled tokens counts

# the arrays of a microbatch that have an entry a row
BY_ROW = (
    *("row_index", "targets", "rollout_logprobs", "old_logprobs", "advantages", "row_weights"),
    *("rollouts", "turns", "groups", "returns", "old_values"),
)


def row_weight(num_sampled: int, *, aggregation: str = "token", most_tokens: int = 1) -> float:
    """What each of a rollout's sampled tokens counts: "token", 1, for the mean over all tokens (DAPO);
    "rollout", 1 / their number, for the mean over rollouts of their means (GRPO); "constant",
    1 / most_tokens, whatever their number, for the mean over rollouts of their sums (Dr. GRPO, arXiv
    2503.20783). most_tokens: what any rollout may sample."""
    if aggregation == "constant":
        return 1.0 / most_tokens
    return {"token": 1.0, "rollout": 1.0 / max(num_sampled, 1)}[aggregation]


def build_microbatch(samples: Sequence[TrainingSample], weight: RowWeight = row_weight) -> Microbatch:
    """The arrays of one microbatch (records.Microbatch says what they hold); no samples give the empty
    one."""
    input_ids, lengths = _pad([s.ids for s in samples] or [np.zeros(1, dtype=np.int64)])
    positions = [np.flatnonzero(s.loss_mask) for s in samples]
    counts = [len(p) for p in positions]
    # A row is a sampled token; the logits one position before it predict it, hence the p - 1 below. Query
    # rows are numbers of rows: a query token's place among its sample's sampled tokens, after those of
    # earlier samples.
    first_rows = np.cumsum([0, *counts])
    query_rows = [
        first + np.searchsorted(own, s.query_positions)
        for s, own, first in zip(samples, positions, first_rows)
        if s.is_distilled
    ]
    distilled = [s for s in samples if s.is_distilled]
    num_queries = [len(s.query_positions) for s in distilled]
    logprobs = _join([s.rollout_logprobs[p] for s, p in zip(samples, positions)], np.float32)
    own_turns = [s.turns[p] for s, p in zip(samples, positions)]
    first_turns = np.cumsum([0, *(int(turns.max(initial=-1)) + 1 for turns in own_turns)])
    return Microbatch(
        input_ids=input_ids,
        lengths=lengths,
        prompt_lengths=np.array([s.prompt_length for s in samples] or [0], dtype=np.int64),
        row_index=_join([b * input_ids.shape[1] + p - 1 for b, p in enumerate(positions)], np.int64),
        targets=_join([s.ids[p] for s, p in zip(samples, positions)], np.int64),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=_join([s.advantages[p] for s, p in zip(samples, positions)], np.float32),
        row_weights=_spread([weight(count) for count in counts], counts, np.float32),
        rollouts=_spread(range(len(samples)), counts, np.int64),
        groups=_spread([s.group for s in samples], counts, np.int64),
        turns=_join([first + turns for first, turns in zip(first_turns, own_turns)], np.int64),
        returns=np.zeros(sum(counts), np.float32),
        old_values=np.zeros(sum(counts), np.float32),
        **_teacher_arrays(distilled),
        query_rows=_join(query_rows, np.int64),
        query_weights=_spread([1.0 / n for n in num_queries], num_queries, np.float32),
        query_in_spread=_spread([s.group_has_spread for s in distilled], num_queries, bool),
    )


def _teacher_arrays(distilled: Sequence[TrainingSample]) -> dict[str, Any]:
    """The teacher's prompts, each once, and the continuations of the distilled samples."""
    views = [view for sample in distilled for view in sample.teacher_views]
    numbers = {
        prompt: number for number, prompt in enumerate(dict.fromkeys(view.prompt_ids for view in views))
    }
    prompts, prompt_lengths = _pad([np.array(prompt[:-1], dtype=np.int64) for prompt in numbers], at_least=1)
    ids, lengths = _pad([view.continuation for view in views])
    rows = [b * ids.shape[1] + view.offsets for b, view in enumerate(views)]
    return {
        "teacher_prompts": prompts,
        "teacher_prompt_lengths": prompt_lengths,
        "teacher_prompt_of": np.array([numbers[view.prompt_ids] for view in views], dtype=np.int64),
        "teacher_ids": ids,
        "teacher_lengths": lengths,
        "teacher_rows": _join(rows, np.int64),
    }


def distilled_part(microbatch: Microbatch, weights: TermWeights) -> Microbatch:
    """What a pass without the policy term needs: the query rows that it distils, the sequences they lie in,
    cut after the last.

    Nothing left gives the empty microbatch. A microbatch with a teacher keeps one, so that ranks stay
    aligned.
    """
    m = microbatch
    # Without the policy term, rows that are no query row have no loss, and nothing to the right of the last
    # query row of a sequence reaches it: under causal attention both can go.
    kept = np.where(m.query_in_spread, weights.distill_spread, weights.distill_no_spread) != 0.0
    rows = m.query_rows[kept]
    if len(rows) == 0:
        empty = replace(build_microbatch([]), layout=m.layout)
        return empty.with_dummy_teacher() if m.has_teacher else empty
    input_ids, lengths, row_index, sequences = _cut(m.input_ids, m.lengths, m.row_index[rows])
    teacher_ids, teacher_lengths, teacher_rows, used = _cut(
        m.teacher_ids, m.teacher_lengths, m.teacher_rows[kept]
    )
    prompts, prompt_of = np.unique(m.teacher_prompt_of[used], return_inverse=True)
    by_row = {name: getattr(m, name)[rows] for name in BY_ROW if name != "row_index"}
    by_query = {name: getattr(m, name)[kept] for name in ("query_weights", "query_in_spread")}
    return Microbatch(
        input_ids=input_ids,
        lengths=lengths,
        prompt_lengths=np.minimum(m.prompt_lengths[sequences], lengths),
        row_index=row_index,
        teacher_prompts=m.teacher_prompts[prompts],
        teacher_prompt_lengths=m.teacher_prompt_lengths[prompts],
        teacher_prompt_of=prompt_of,
        teacher_ids=teacher_ids,
        teacher_lengths=teacher_lengths,
        teacher_rows=teacher_rows,
        query_rows=np.arange(len(rows)),
        layout=m.layout,
        **by_row,
        **by_query,
    )


def row_share(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """The microbatch with every size-th of its rows, and the query rows among them: a rank's part where
    `size` ranks read the same sequences. The sequences stay."""
    m, rows = microbatch, np.arange(rank, len(microbatch.row_index), size)
    own = m.query_rows % size == rank
    by_query = ("teacher_rows", "query_weights", "query_in_spread")
    return replace(
        m,
        query_rows=m.query_rows[own] // size,
        **{name: getattr(m, name)[rows] for name in BY_ROW},
        **{name: getattr(m, name)[own] for name in by_query},
    )


def _cut(
    ids: np.ndarray, lengths: np.ndarray, flat_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids [N, S], lengths [N] and flat positions in them, without the sequences and columns that hold none
    of the positions; and which sequences are left."""
    sequences, columns = np.divmod(flat_rows, ids.shape[1])
    used, places = np.unique(sequences, return_inverse=True)
    width = int(columns.max()) + 1
    return ids[used, :width], np.minimum(lengths[used], width), places * width + columns, used


def _pad(rows: Sequence[np.ndarray], at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [N, longest] with zeros (no narrower than at_least), and the lengths [N]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.zeros((len(rows), int(lengths.max(initial=at_least))), dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded, lengths


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def _spread(values: Sequence[float], counts: Sequence[int], dtype: type) -> np.ndarray:
    return np.repeat(np.array(values, dtype=dtype), np.array(counts, dtype=np.int64))
