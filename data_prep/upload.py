"""Fill a Qdrant collection with passages and their vectors."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from data_prep.table import PassageTable
from data_prep.vectors import VectorShards
from megatron_sd.config import QdrantConfig
from megatron_sd.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UploadConfig:
    """`sd-search data upload`: which passages, and where to."""

    passages: str
    qdrant: QdrantConfig
    batch_size: int = 256


def upload_passages(config: UploadConfig, client: QdrantClient) -> int:
    """Create the collection, fill it, and return the number of points; row i becomes point i, so a second run continues safely.

    Raises DataError when the vectors are not of these passages, or the server refuses.
    """
    table = PassageTable(Path(config.passages))
    vectors = VectorShards(Path(config.qdrant.vectors))
    if vectors.manifest.made_from["passages"] != table.version:
        raise DataError(f"{config.qdrant.vectors} holds vectors of other passages than {config.passages}: encode these")
    name = config.qdrant.collection
    try:
        if not client.collection_exists(name):
            params = models.VectorParams(size=vectors.dim, distance=models.Distance.DOT)
            client.create_collection(name, vectors_config=params)
        passages = iter(table)
        start = 0
        for block in vectors.blocks(config.batch_size):
            points = [
                models.PointStruct(
                    id=start + place,
                    vector=block[place].tolist(),
                    payload={"passage_id": p.id, "title": p.title, "text": p.text, "vectors_version": vectors.version},
                )
                for place, p in enumerate(islice(passages, len(block)))
            ]
            client.upsert(name, points)
            start += len(points)
        return client.count(name).count
    except (ApiException, httpx.HTTPError, ValueError) as error:
        raise DataError(f"Qdrant at {config.qdrant.url} refused the upload: {type(error).__name__}: {error}") from error
