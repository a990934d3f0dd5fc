"""Cutting a step's samples into microbatches: equal in number on every rank, balanced in cost, with little
padding.

Losses are sums over rows divided by global totals, so any packing gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.records import Batch, Microbatch, TokenIds, Totals, TrainingSample

Bin = list[int]  # indices of the samples of one microbatch
RowWeight = Callable[[TrainingSample], float]  # what each of its sampled tokens counts
# the arrays of a microbatch that have an entry a row
BY_ROW = (
    *("row_index", "targets", "rollout_logprobs", "old_logprobs", "advantages", "row_weights"),
    *("rollouts", "turns", "groups", "returns", "old_values"),
)
Packer = Callable[[Sequence[TrainingSample]], Batch]  # all samples of the step -> this rank's part


def pack(
    samples: Sequence[TrainingSample],
    *,
    max_tokens: int,
    world_size: int,
    aggregation: str,
    most_tokens: int = 1,
    one_row: bool = False,
) -> list[Batch]:
    """One batch per rank, from all samples of the step; deterministic.

    Samples are sorted by length and cut into the smallest number of microbatches that is a multiple of
    world_size and keeps each under max_tokens positions (student and teacher, padding included); the cut
    then makes the largest one as small as possible. A sample longer than max_tokens gets a microbatch of
    its own. Microbatches at the same place on different ranks have similar costs, because ranks wait for
    each other there. aggregation, most_tokens: see row_weight. one_row: sequences are read without padding,
    and positions are counted as they are then read (algorithm/packed.py).
    """
    sizes, tally = sizes_of(samples), _OneRowTally if one_row else _Tally
    bins = plan_bins(sizes, max_tokens, world_size, tally=tally)
    weight = partial(row_weight, aggregation=aggregation, most_tokens=most_tokens)
    totals = count_totals(samples, aggregation)
    batches = []
    for rank_bins in assign_bins(bins, [bin_cost(sizes, b, tally=tally) for b in bins], world_size):
        microbatches = [build_microbatch([samples[i] for i in b], weight) for b in rank_bins]
        batches.append(
            Batch(microbatches=tuple(replace(m, is_packed=one_row) for m in microbatches), totals=totals)
        )
    return align_teachers(batches)


def count_totals(samples: Sequence[TrainingSample], aggregation: str) -> Totals:
    """Global denominators of the step."""
    if aggregation == "constant":
        policy_weight = float(len(samples))
    else:
        weights = [row_weight(s, aggregation=aggregation) for s in samples]
        policy_weight = sum(
            weight * int(s.loss_mask.sum()) for weight, s in zip(weights, samples, strict=True)
        )
    return Totals(policy_weight=policy_weight, distilled_rollouts=float(sum(s.is_distilled for s in samples)))


def row_weight(sample: TrainingSample, *, aggregation: str = "token", most_tokens: int = 1) -> float:
    """What each of a rollout's tokens counts: "token", 1, for the mean over all tokens (DAPO); "rollout",
    1 / its tokens, for the mean over rollouts of their means (GRPO); "constant", 1 / most_tokens, whatever
    its length, for the mean over rollouts of their sums (Dr. GRPO, arXiv 2503.20783). most_tokens: what any
    rollout may sample."""
    if aggregation == "constant":
        return 1.0 / most_tokens
    return {"token": 1.0, "rollout": 1.0 / max(int(sample.loss_mask.sum()), 1)}[aggregation]


class Size(NamedTuple):
    """Token counts of a sample: the student's sequence, and for each of the teacher's views its
    continuation, its prompt, and a number that views with the same prompt share."""

    student: int
    views: tuple[tuple[int, int, int], ...]

    @property
    def continuations(self) -> int:
        """Tokens of all the teacher's continuations."""
        return sum(continuation for continuation, _, _ in self.views)


def sizes_of(samples: Sequence[TrainingSample]) -> list[Size]:
    """One per sample."""
    numbers: dict[TokenIds, int] = {}
    sizes = []
    for s in samples:
        views = s.teacher_views if s.is_distilled else ()
        counts = [
            (len(v.continuation), len(v.prompt_ids), numbers.setdefault(v.prompt_ids, len(numbers)))
            for v in views
        ]
        sizes.append(Size(len(s.ids), tuple(counts)))
    return sizes


class _Tally:
    """Padded positions of a microbatch as it fills: every block of sequences is as wide as its longest."""

    def __init__(self) -> None:
        self._students = self._continuations = self._widest = self._widest_continuation = (
            self._widest_prompt
        ) = 0
        self._prompts: set[int] = set()

    def add(self, size: Size) -> int:
        """The cost with this sample in it."""
        self._students += 1
        self._widest = max(self._widest, size.student)
        for continuation, prompt, prompt_number in size.views:
            self._continuations += 1
            self._prompts.add(prompt_number)
            self._widest_continuation = max(self._widest_continuation, continuation)
            self._widest_prompt = max(self._widest_prompt, prompt)
        return (
            self._students * self._widest
            + self._continuations * self._widest_continuation
            + len(self._prompts) * self._widest_prompt
        )


class _OneRowTally:
    """The same without padding, where each of the teacher's continuations has its own copy of its prompt."""

    def __init__(self):
        self._tokens = 0

    def add(self, size: Size) -> int:
        """The cost with this sample in it."""
        self._tokens += size.student + sum(
            continuation + prompt - 1 for continuation, prompt, _ in size.views
        )
        return self._tokens


def bin_cost(
    sizes: Sequence[Size], indices: Bin, *, tally: Callable[[], _Tally | _OneRowTally] = _Tally
) -> int:
    """Positions of the microbatch: student and teacher, padding included where there is some."""
    counted = tally()
    return max((counted.add(sizes[i]) for i in indices), default=0)


def plan_bins(
    sizes: Sequence[Size],
    max_tokens: int,
    world_size: int,
    *,
    tally: Callable[[], _Tally | _OneRowTally] = _Tally,
) -> list[Bin]:
    """Bins of sample indices; their number is a positive multiple of world_size (empty bins fill up)."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].student, -sizes[i].continuations, i))
    num_bins = max(len(_fill(sizes, order, max_tokens, tally)), 1)
    # Every rank takes as many: a collective runs in each microbatch. Bins that this adds may as well be
    # used, so the capacity is searched for once more: the smallest that needs no more than num_bins.
    num_bins = -(-num_bins // world_size) * world_size
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_fill(sizes, order, middle, tally)) <= num_bins else (middle + 1, high)
        )
    bins = _fill(sizes, order, low, tally)
    return bins + [[] for _ in range(num_bins - len(bins))]


def _fill(
    sizes: Sequence[Size], order: Sequence[int], capacity: int, tally: Callable[[], _Tally | _OneRowTally]
) -> list[Bin]:
    """Cut the order into runs as long as the capacity allows; a sample above the capacity is a run of its
    own."""
    bins: list[Bin] = []
    counted = tally()
    for index in order:
        if bins and counted.add(sizes[index]) <= capacity:
            bins[-1].append(index)
            continue
        counted = tally()
        counted.add(sizes[index])
        bins.append([index])
    return bins


def assign_bins(bins: Sequence[Bin], costs: Sequence[int], world_size: int) -> list[list[Bin]]:
    """Deal the bins, costliest first, in rounds of one per rank; within a round the least loaded rank gets
    the costliest."""
    ranks: list[list[Bin]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    order = sorted(range(len(bins)), key=lambda i: (-costs[i], i))
    for start in range(0, len(order), world_size):
        receivers = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(receivers, order[start : start + world_size], strict=True):
            ranks[rank].append(bins[index])
            loads[rank] += costs[index]
    return ranks


def padding_share(microbatches: Iterable[Microbatch]) -> float:
    """Positions, student's and teacher's, that hold no token."""
    sizes = [(m.num_padding_tokens, m.input_ids.size + m.teacher_ids.size) for m in microbatches]
    return sum(padding for padding, _ in sizes) / sum(size for _, size in sizes)


def packing_metrics(batches: Iterable[Batch]) -> dict[str, float]:
    """Of this rank's part of a step, by TensorBoard name."""
    microbatches = [microbatch for batch in batches for microbatch in batch]
    return {
        "update/microbatches": len(microbatches),
        "update/padding_share": padding_share(microbatches),
    }


def align_teachers(batches: Sequence[Batch]) -> list[Batch]:
    """Where any rank's microbatch has a teacher, every rank's has one: a single token without rows, so that
    collectives match."""
    columns = zip(*(batch.microbatches for batch in batches), strict=True)
    aligned = [
        [
            m.with_dummy_teacher() if any(other.has_teacher for other in column) and not m.has_teacher else m
            for m in column
        ]
        for column in columns
    ]
    return [
        Batch(microbatches=tuple(microbatches), totals=batch.totals)
        for batch, microbatches in zip(batches, zip(*aligned, strict=True), strict=True)
    ]


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
        row_index=_join([b * input_ids.shape[1] + p - 1 for b, p in enumerate(positions)], np.int64),
        targets=_join([s.ids[p] for s, p in zip(samples, positions)], np.int64),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=_join([s.advantages[p] for s, p in zip(samples, positions)], np.float32),
        row_weights=_spread([weight(s) for s in samples], counts, np.float32),
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
        empty = replace(build_microbatch([]), is_packed=m.is_packed)
        return empty.with_dummy_teacher() if m.has_teacher else empty
    input_ids, lengths, row_index, _ = _cut(m.input_ids, m.lengths, m.row_index[rows])
    teacher_ids, teacher_lengths, teacher_rows, used = _cut(
        m.teacher_ids, m.teacher_lengths, m.teacher_rows[kept]
    )
    prompts, prompt_of = np.unique(m.teacher_prompt_of[used], return_inverse=True)
    by_row = {name: getattr(m, name)[rows] for name in BY_ROW if name != "row_index"}
    by_query = {name: getattr(m, name)[kept] for name in ("query_weights", "query_in_spread")}
    return Microbatch(
        input_ids=input_ids,
        lengths=lengths,
        row_index=row_index,
        teacher_prompts=m.teacher_prompts[prompts],
        teacher_prompt_lengths=m.teacher_prompt_lengths[prompts],
        teacher_prompt_of=prompt_of,
        teacher_ids=teacher_ids,
        teacher_lengths=teacher_lengths,
        teacher_rows=teacher_rows,
        query_rows=np.arange(len(rows)),
        is_packed=m.is_packed,
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
