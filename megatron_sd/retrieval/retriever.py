"""What a rollout needs of a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_sd.records import Hit


class Retriever(Protocol):
    """Finds passages for queries. `corpus_version` identifies the corpus (manifest hash)."""

    corpus_version: str

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` passages of each query, best first, ties by passage id. Raises RetrievalError."""
        ...
