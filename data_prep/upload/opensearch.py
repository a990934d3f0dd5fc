"""Fill an OpenSearch index with passages, and with their vectors where there are any."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from opensearchpy import OpenSearch
from opensearchpy.exceptions import OpenSearchException
from opensearchpy.helpers import streaming_bulk

from data_prep.passages.table import PassageTable
from data_prep.upload.source import UploadConfig, matching_vectors
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import OpenSearchConfig
from megatron_sd.errors import DataError, RetrievalError
from megatron_sd.retrieval.remote.opensearch import CONTENTS, VECTOR, IndexContents, ask, place, read_contents

log = logging.getLogger(__name__)

_LOGGED_EVERY = 100_000


def upload_passages(config: UploadConfig, target: OpenSearchConfig, client: OpenSearch) -> int:
    """Create the index, fill it, and return the number of documents; row i becomes document i, so a second
    run goes on safely.

    Raises DataError when the vectors are not of these passages, the index holds others, or the server
    refuses.
    """
    table = PassageTable(Path(config.passages))
    vectors = None if target.vectors is None else matching_vectors(target.vectors, table, config.passages)
    version = None if vectors is None else vectors.version
    wanted = IndexContents(passages_version=table.version, vectors_version=version, num_passages=len(table))
    try:
        held = read_contents(client, target)
        if held is None:
            body = index_body(target, wanted, None if vectors is None else vectors.dim)
            ask(target, lambda: client.indices.create(index=target.index, body=body))
        elif held != wanted:
            differing = [name for name, value in vars(wanted).items() if getattr(held, name) != value]
            shown = ", ".join(
                f"{name} {getattr(held, name)}, expected {getattr(wanted, name)}" for name in differing
            )
            raise DataError(f"{place(target)} holds {shown}: choose another index, or delete it")
        actions = _actions(table, vectors, target, config.batch_size)
        for number, _ in enumerate(
            streaming_bulk(client, actions, chunk_size=config.batch_size, max_retries=3), start=1
        ):
            if number % _LOGGED_EVERY == 0:
                log.info("%s: %s passages", place(target), f"{number:,}")
        ask(target, lambda: client.indices.refresh(index=target.index))
        return ask(target, lambda: client.count(index=target.index)["count"])
    except RetrievalError as error:
        raise DataError(f"upload failed: {error}") from error
    except OpenSearchException as error:
        raise DataError(
            f"{place(target)} refused the upload: {type(error).__name__}: {str(error)[:500]}"
        ) from error


def index_body(target: OpenSearchConfig, wanted: IndexContents, dim: int | None) -> dict[str, Any]:
    """Settings and mapping: BM25 over title and text as one field, read as English; strict, so that nothing
    else comes in."""
    copied = {"type": "text", "index": False, "copy_to": CONTENTS}
    properties: dict[str, Any] = {"passage_id": {"type": "keyword"}, "passages_version": {"type": "keyword"}}
    properties |= {"title": copied, "text": copied, CONTENTS: {"type": "text", "analyzer": "english"}}
    settings: dict[str, Any] = {"similarity": {"default": {"type": "BM25", "k1": target.k1, "b": target.b}}}
    if dim is not None:
        method = {"name": "hnsw", "space_type": "innerproduct", "engine": "faiss"}
        properties[VECTOR] = {"type": "knn_vector", "dimension": dim, "method": method}
        settings["knn"] = True
    mapping = {
        "dynamic": "strict",
        "_meta": {"sd_search": dataclasses.asdict(wanted)},
        "properties": properties,
    }
    return {"settings": {"index": settings}, "mappings": mapping}


def _actions(
    table: PassageTable, vectors: VectorShards | None, target: OpenSearchConfig, batch_size: int
) -> Iterator[dict[str, Any]]:
    """One document a row, in row order."""
    rows: Iterator[np.ndarray | None] = repeat(None)
    if vectors is not None:
        rows = (vector for block in vectors.blocks(batch_size) for vector in block)
    for number, (passage, vector) in enumerate(zip(table, rows)):
        source = {
            "passage_id": passage.id,
            "title": passage.title,
            "text": passage.text,
            "passages_version": table.version,
        }
        source |= {} if vector is None else {VECTOR: vector.tolist()}
        yield {"_op_type": "index", "_index": target.index, "_id": str(number), "_source": source}
