"""Cutting a step's samples into microbatches.

Losses are sums over rows divided by global totals, so any packing gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from megatron_sd.algorithm.packing.bins import TALLIES, assign_bins, bin_cost, plan_bins, sizes_of
from megatron_sd.algorithm.packing.microbatches import build_microbatch, row_weight
from megatron_sd.records import Batch, Layout, Microbatch, Totals, TrainingSample

Packer = Callable[[Sequence[TrainingSample]], Batch]  # all samples of the step -> this rank's part


def pack(
    samples: Sequence[TrainingSample],
    *,
    max_tokens: int,
    world_size: int,
    aggregation: str,
    most_tokens: int = 1,
    layout: Layout = "padded",
) -> list[Batch]:
    """One batch per rank, from all samples of the step; deterministic.

    Samples are sorted by length, or kept with those of the same prompt where they share it, and cut into the
    smallest number of microbatches that is a multiple of world_size and keeps each under max_tokens positions
    (student and teacher, padding included); the cut then makes the largest one as small as possible. A sample
    longer than max_tokens gets a microbatch of its own. Microbatches at the same place on different ranks have
    similar costs, because ranks wait for each other there. aggregation, most_tokens: see row_weight. layout:
    how sequences are read (algorithm/packing/rows.py), and positions counted.
    """
    sizes, tally = sizes_of(samples), TALLIES[layout]
    bins = plan_bins(sizes, max_tokens, world_size, tally=tally)
    weight = partial(row_weight, aggregation=aggregation, most_tokens=most_tokens)
    totals = count_totals(samples, aggregation)
    batches = []
    for rank_bins in assign_bins(bins, [bin_cost(sizes, b, tally=tally) for b in bins], world_size):
        microbatches = [build_microbatch([samples[i] for i in b], weight) for b in rank_bins]
        batches.append(
            Batch(microbatches=tuple(replace(m, layout=layout) for m in microbatches), totals=totals)
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
