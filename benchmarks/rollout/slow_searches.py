"""A corpus whose searches take their time: a `retriever.function` for stragglers.py and for grids.

Environment: SLOW_CORPUS, a corpus directory; SLOW_SCALE, 1 unless set, of all waits.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
from collections.abc import Sequence

from megatron_sd.config.retriever import SearchConfig
from megatron_sd.records import Hit
from megatron_sd.retrieval.corpus.directory import CorpusRetriever

MEDIAN_S, SIGMA = 0.2, 1.0  # of the lognormal waits
LONG_S, LONG_SHARE = 30.0, 0.01  # of those that hang
_waits = random.Random(0)


@functools.cache
def _corpus() -> CorpusRetriever:
    return CorpusRetriever(os.environ["SLOW_CORPUS"], SearchConfig(), shares_gpus=False)


async def search(queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
    """What the corpus has, after a wait."""
    wait_s = LONG_S if _waits.random() < LONG_SHARE else MEDIAN_S * _waits.lognormvariate(0.0, SIGMA)
    await asyncio.sleep(wait_s * float(os.environ.get("SLOW_SCALE", "1")))
    return await _corpus().search(queries, top_k)
