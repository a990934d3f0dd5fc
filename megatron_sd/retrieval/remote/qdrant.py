"""Vectors in a Qdrant collection, for those who outgrow one node: the encoder runs here, the search there.

`sd-search data upload` fills a collection. Every point carries its passage and the version of the vectors
it came from; an answer from other vectors is refused. Needs the extra `[qdrant]`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from megatron_sd.config import QdrantConfig
from megatron_sd.errors import DataError, RetrievalError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.corpus.encoder import Encoder, EncoderSettings, choose_device
from megatron_sd.retrieval.corpus.manifest import open_manifest
from megatron_sd.retrieval.remote.client import read_token

PAYLOAD_FIELDS = ("passage_id", "title", "text", "vectors_version")


class QdrantRetriever:
    """Searches a collection. `corpus_version` is the version of the vectors directory it was filled from.

    One thread encodes and asks, so rollouts go on meanwhile.
    """

    def __init__(self, config: QdrantConfig, client: QdrantClient) -> None:
        """Open the encoder of the vectors directory `config.vectors`. Raises DataError when it is damaged."""
        directory = Path(config.vectors)
        manifest, self.corpus_version = open_manifest(directory, "vectors")
        settings = EncoderSettings(**manifest.settings["encoder"])
        self._encoder = Encoder(directory / "encoder", settings, choose_device(config.device))
        self._config = config
        self._client = client
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qdrant")

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` passages of each query by inner product, best first, ties by id.

        Raises RetrievalError when the collection cannot be asked or holds something else.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self.find, tuple(queries), top_k
        )

    def find(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """`search` in the calling thread."""
        vectors = self._encoder.encode_queries(queries)
        requests = [
            models.QueryRequest(query=vector.tolist(), limit=top_k, with_payload=True) for vector in vectors
        ]
        try:
            replies = self._client.query_batch_points(self._config.collection, requests)
        except (ApiException, httpx.HTTPError, ValueError, TypeError) as error:
            raise RetrievalError(
                f"Qdrant collection {self._config.collection!r} at {self._config.url} gave no answer: "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(replies) != len(queries):
            raise RetrievalError(f"Qdrant answered {len(replies)} queries, expected {len(queries)}")
        return [self._hits(reply.points) for reply in replies]

    def _hits(self, points: Sequence[models.ScoredPoint]) -> tuple[Hit, ...]:
        hits = [Hit(passage=self._passage(point.payload or {}), score=float(point.score)) for point in points]
        return tuple(sorted(hits, key=lambda hit: (-hit.score, hit.passage.id)))

    def _passage(self, payload: Mapping[str, Any]) -> Passage:
        missing = [name for name in PAYLOAD_FIELDS if not isinstance(payload.get(name), str)]
        if missing:
            raise RetrievalError(
                f"Qdrant collection {self._config.collection!r} holds a point without the text field"
                f" {missing[0]!r} (it has {', '.join(sorted(payload)) or 'none'}); fill it with `sd-search"
                " data upload`"
            )
        if payload["vectors_version"] != self.corpus_version:
            found, expected = payload["vectors_version"][:16], self.corpus_version[:16]
            raise RetrievalError(
                f"Qdrant collection {self._config.collection!r} holds vectors {found}, expected {expected}"
            )
        return Passage(id=payload["passage_id"], title=payload["title"], text=payload["text"])


def connect(config: QdrantConfig) -> QdrantClient:
    """A client of a server. Raises DataError for an address that cannot be one, or a secret that cannot be
    read."""
    token = None if config.token_file is None else read_token(config.token_file)
    try:
        return QdrantClient(url=config.url, api_key=token, timeout=math.ceil(config.deadline_s))
    except ValueError as error:
        raise DataError(
            f"retriever.qdrant.url: found {config.url!r} ({error}), expected http://host:port"
        ) from error
