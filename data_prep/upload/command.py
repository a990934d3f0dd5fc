"""`sd-search data upload`: passages, and vectors where there are any, to a Qdrant collection or an
OpenSearch index."""

from __future__ import annotations

from data_prep.upload.source import UploadConfig
from megatron_sd.errors import ConfigError
from megatron_sd.machine import require_extra


def upload(config: UploadConfig) -> str:
    """Fill what is configured and say with how many passages. Needs the extra of the server.

    Raises ConfigError unless one server is configured, DataError as its upload does.
    """
    if (config.qdrant is None) == (config.opensearch is None):
        found = "neither" if config.qdrant is None else "both"
        raise ConfigError(
            f"qdrant, opensearch: found {found}, expected one: --qdrant.url ... or --opensearch.url ..."
        )
    require_extra(
        *(("qdrant_client", "qdrant") if config.qdrant is not None else ("opensearchpy", "opensearch")),
        "upload",
    )
    if config.qdrant is not None:
        from data_prep.upload.qdrant import upload_passages
        from megatron_sd.retrieval.remote.qdrant import connect

        num_points = upload_passages(config, config.qdrant, connect(config.qdrant))
        return f"{num_points} passages -> {config.qdrant.collection} at {config.qdrant.url}"
    from data_prep.upload.opensearch import upload_passages
    from megatron_sd.retrieval.remote.opensearch import connect

    num_passages = upload_passages(config, config.opensearch, connect(config.opensearch))
    return f"{num_passages} passages -> {config.opensearch.index} at {config.opensearch.url}"
