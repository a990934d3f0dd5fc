"""Fill a Qdrant collection with passages and their vectors."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from data_prep.passages.table import PassageTable
from data_prep.upload.source import UploadConfig, matching_vectors
from megatron_sd.config import QdrantConfig
from megatron_sd.errors import DataError


def upload_passages(config: UploadConfig, target: QdrantConfig, client: QdrantClient) -> int:
    """Create the collection, fill it, and return the number of points; row i becomes point i, so a second
    run continues safely.

    Raises DataError when the vectors are not of these passages, or the server refuses.
    """
    table = PassageTable(Path(config.passages))
    vectors = matching_vectors(target.vectors, table, config.passages)
    name = target.collection
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
                    payload={
                        "passage_id": p.id,
                        "title": p.title,
                        "text": p.text,
                        "vectors_version": vectors.version,
                    },
                )
                for place, p in enumerate(islice(passages, len(block)))
            ]
            client.upsert(name, points)
            start += len(points)
        return client.count(name).count
    except (ApiException, httpx.HTTPError, ValueError) as error:
        raise DataError(
            f"Qdrant at {target.url} refused the upload: {type(error).__name__}: {error}"
        ) from error
