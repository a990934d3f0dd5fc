"""Which retriever a configuration asks for."""

from __future__ import annotations

from megatron_sd.config import RetrieverConfig
from megatron_sd.errors import ConfigError
from megatron_sd.machine import require_extra
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.own import OwnRetriever
from megatron_sd.retrieval.retriever import Retriever


def open_retriever(config: RetrieverConfig, *, alone: bool = False) -> Retriever:
    """A corpus directory in this process, a client of its servers or of others', or the user's own function.
    alone: nothing in this process waits for it, or needs its GPUs.

    Raises DataError for a damaged corpus, ConfigError for a top_k above its passages, endpoints of
    different corpora or a client that is not installed, RetrievalError when a server cannot be reached.
    """
    if config.corpus is not None:
        return _local(config, config.corpus, alone=alone)
    if config.function is not None:
        return OwnRetriever(config.function, deadline_s=config.client.deadline_s)
    if config.qdrant is not None:
        require_extra("qdrant_client", "qdrant", "retriever")
        from megatron_sd.retrieval.remote.qdrant import QdrantRetriever, connect

        return QdrantRetriever(config.qdrant, connect(config.qdrant))
    if config.opensearch is not None:
        require_extra("opensearchpy", "opensearch", "retriever")
        from megatron_sd.retrieval.remote import opensearch

        return opensearch.OpenSearchRetriever(config.opensearch, opensearch.connect(config.opensearch))
    if config.web is not None:
        from megatron_sd.retrieval.remote.web_search import WebSearchRetriever

        return WebSearchRetriever(config.web, top_k=config.top_k)
    from megatron_sd.retrieval.remote.client import HttpRetriever
    from megatron_sd.retrieval.remote.shards import ShardedRetriever

    if config.sharded:
        return ShardedRetriever([HttpRetriever([url], config.client) for url in config.endpoints])
    return HttpRetriever(config.endpoints, config.client)


def _local(config: RetrieverConfig, corpus: str, *, alone: bool) -> CorpusRetriever:
    retriever = CorpusRetriever(corpus, config.search, shares_gpus=not alone)
    num_passages = len(retriever.passages)
    if config.top_k > num_passages:
        raise ConfigError(
            f"retriever.top_k: found {config.top_k}, expected at most {num_passages}, the passages of"
            f" {corpus}"
        )
    return retriever
