"""One corpus behind several retrievers, each of which holds a part of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_sd.records import Hit
from megatron_sd.retrieval.corpus.fusion import merge_shards
from megatron_sd.retrieval.retriever import Retriever


class ShardedRetriever:
    """A search asks every shard and merges what they found; `corpus_version` joins theirs, in any order."""

    def __init__(self, shards: Sequence[Retriever]) -> None:
        self._shards = tuple(shards)
        self.corpus_version = "+".join(sorted(shard.corpus_version for shard in shards))

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` passages of each query over all shards, by score, then by id. Raises
        RetrievalError."""
        found = await asyncio.gather(*(shard.search(queries, top_k) for shard in self._shards))
        return [merge_shards(own, top_k) for own in zip(*found, strict=True)]
