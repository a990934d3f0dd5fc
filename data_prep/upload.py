"""`sd-search data upload`: passages, and vectors where there are any, to a Qdrant collection or an OpenSearch index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.table import PassageTable
from data_prep.vectors import VectorShards
from megatron_sd.config import OpenSearchConfig, QdrantConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.choice import require_extra


@dataclass(frozen=True, kw_only=True)
class UploadConfig:
    """Which passages, and where to: one of the two."""

    passages: str
    qdrant: QdrantConfig | None = None
    opensearch: OpenSearchConfig | None = None  # its `vectors`, where set, are uploaded as well
    batch_size: int = 256


def upload(config: UploadConfig) -> str:
    """Fill what is configured and say with how many passages. Needs the extra of the server.

    Raises ConfigError unless one server is configured, DataError as its upload does.
    """
    if (config.qdrant is None) == (config.opensearch is None):
        found = "neither" if config.qdrant is None else "both"
        raise ConfigError(f"qdrant, opensearch: found {found}, expected one: --qdrant.url ... or --opensearch.url ...")
    require_extra(*(("qdrant_client", "qdrant") if config.qdrant is not None else ("opensearchpy", "opensearch")))
    if config.qdrant is not None:
        from data_prep.upload_qdrant import upload_passages
        from megatron_sd.retrieval.qdrant import connect

        num_points = upload_passages(config, config.qdrant, connect(config.qdrant))
        return f"{num_points} passages -> {config.qdrant.collection} at {config.qdrant.url}"
    from data_prep import upload_opensearch
    from megatron_sd.retrieval import opensearch

    num_passages = upload_opensearch.upload_passages(config, config.opensearch, opensearch.connect(config.opensearch))
    return f"{num_passages} passages -> {config.opensearch.index} at {config.opensearch.url}"


def matching_vectors(directory: str, table: PassageTable, passages: str) -> VectorShards:
    """The vectors of these passages. Raises DataError when they are of others."""
    vectors = VectorShards(Path(directory))
    if vectors.manifest.made_from["passages"] != table.version:
        raise DataError(f"{directory} holds vectors of other passages than {passages}: encode these")
    return vectors
