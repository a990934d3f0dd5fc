"""Cutting a step's samples into microbatches.

Losses are sums over rows divided by global totals, so any packing gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from megatron_sd.algorithm.packing.bins import TALLIES, Bin, assign_bins, bin_cost, plan_bins
from megatron_sd.algorithm.packing.microbatches import build_microbatch, row_weight
from megatron_sd.algorithm.packing.outlines import Outline, Samples
from megatron_sd.records import Batch, Layout, Microbatch, Totals, TrainingSample


def pack(
    samples: Sequence[TrainingSample],
    *,
    max_tokens: int,
    world_size: int,
    aggregation: str,
    most_tokens: int = 1,
    layout: Layout = "padded",
) -> list[Batch]:
    """One batch per rank, from all samples of the step; each is what own_batch makes on its rank."""
    packed = partial(own_batch, max_tokens=max_tokens, aggregation=aggregation, most_tokens=most_tokens)
    return [packed(samples, place=(rank, world_size), layout=layout) for rank in range(world_size)]


def own_batch(
    samples: Sequence[TrainingSample],
    *,
    place: tuple[int, int],
    max_tokens: int,
    aggregation: str,
    most_tokens: int = 1,
    layout: Layout = "padded",
) -> Batch:
    """This rank's batch, from all samples of the step, of which it looks at its own alone; deterministic.

    Samples are sorted by length, or kept with those of the same prompt where they share it, and cut into the
    smallest number of microbatches that is a multiple of the ranks and keeps each under max_tokens positions
    (student and teacher, padding included); the cut then makes the largest one as small as possible. A sample
    longer than max_tokens gets a microbatch of its own. Microbatches at the same place on different ranks have
    similar costs, because ranks wait for each other there. place: the rank's number and how many there are.
    aggregation, most_tokens: see row_weight. layout: how sequences are read (algorithm/packing/rows.py), and
    positions counted.
    """
    number, num_ranks = place
    own = Samples.of(samples)
    ranks = deal(own.outlines, max_tokens=max_tokens, num_ranks=num_ranks, layout=layout)
    weight = partial(row_weight, aggregation=aggregation, most_tokens=most_tokens)
    microbatches = []
    for together in zip(*ranks, strict=True):
        made = replace(build_microbatch([own[i] for i in together[number]], weight), layout=layout)
        # Where any rank's microbatch has a teacher, every rank's has one: a single token without rows, so
        # that collectives match.
        is_read = any(own.outlines[i].is_distilled for indices in together for i in indices)
        microbatches.append(made if made.has_teacher or not is_read else made.with_dummy_teacher())
    return Batch(microbatches=tuple(microbatches), totals=count_totals(own.outlines, aggregation))


def deal(
    outlines: Sequence[Outline], *, max_tokens: int, num_ranks: int, layout: Layout = "padded"
) -> list[list[Bin]]:
    """The bins of every rank, as many on each; those at the same place are read at the same time."""
    tally = TALLIES[layout]
    bins = plan_bins(outlines, max_tokens, num_ranks, tally=tally)
    return assign_bins(bins, [bin_cost(outlines, b, tally=tally) for b in bins], num_ranks)


def count_totals(outlines: Sequence[Outline], aggregation: str) -> Totals:
    """Global denominators of the step."""
    if aggregation == "constant":
        policy_weight = float(len(outlines))
    else:
        counts = [outline.num_sampled for outline in outlines]
        policy_weight = sum(row_weight(count, aggregation=aggregation) * count for count in counts)
    distilled = sum(outline.is_distilled for outline in outlines)
    return Totals(policy_weight=policy_weight, distilled_rollouts=float(distilled))


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
