"""What is uploaded: passages, and vectors that were made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.passages.table import PassageTable
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import OpenSearchConfig, QdrantConfig
from megatron_sd.errors import DataError


@dataclass(frozen=True, kw_only=True)
class UploadConfig:
    """Which passages, and where to: one of the two."""

    passages: str  # a passages directory
    qdrant: QdrantConfig | None = None
    opensearch: OpenSearchConfig | None = None  # its `vectors`, where set, are uploaded as well
    batch_size: int = 256  # passages of one request


def matching_vectors(directory: str, table: PassageTable, passages: str) -> VectorShards:
    """The vectors of these passages. Raises DataError when they are of others."""
    vectors = VectorShards(Path(directory))
    if vectors.manifest.made_from["passages"] != table.version:
        raise DataError(f"{directory} holds vectors of other passages than {passages}: encode these")
    return vectors
