"""Rankings joined: two methods over one corpus by reciprocal rank, or the shards of one corpus by score."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sd.records import Hit


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Rows of a corpus and their scores, best first."""

    rows: Sequence[int]
    scores: Sequence[float]


def reciprocal_rank_fusion(rankings: Sequence[Ranking], top_k: int, *, constant: int) -> Ranking:
    """The best rows by the sum over rankings of 1 / (constant + rank), ranks from 1 (Cormack et al. 2009);
    ties by row.

    >>> fused = reciprocal_rank_fusion([Ranking(rows=[7, 3], scores=[9, 8]), Ranking(rows=[3], scores=[1])],
    2, constant=60) >>> fused.rows [3, 7]
    """
    totals: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, row in enumerate(ranking.rows, start=1):
            totals[row] += 1.0 / (constant + rank)
    best = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:top_k]
    return Ranking(rows=[row for row, _ in best], scores=[score for _, score in best])


def merge_shards(found: Sequence[Sequence[Hit]], top_k: int) -> tuple[Hit, ...]:
    """The best hits of a corpus that is cut into shards, from the best of each: by score, then by id.

    Exact when scores mean the same in every shard, as inner products do; BM25 weighs a term by its shard's
    own counts.
    """
    hits = [hit for own in found for hit in own]
    return tuple(sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))[:top_k])
