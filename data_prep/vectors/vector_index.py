"""A FAISS index over the vectors of a corpus: trained on a sample, filled block by block, and measured
against exact search."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from data_prep.vectors.vectors import VectorShards
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.faiss_index import ENCODER_DIRECTORY, INDEX_NAME, FaissKind, set_effort

log = logging.getLogger(__name__)

_BLOCK_ROWS = 65536
_CODE_VALUES = 16  # of 4 bits: FAISS trains on no fewer vectors
_POINTS_PER_LIST = 39  # of the training sample; FAISS warns below


@dataclass(frozen=True, kw_only=True)
class VectorIndexConfig:
    """Which FAISS index; `sd-search data plan` compares them.

    flat, fp16 and sq8 look at every vector (4, 2, 1 bytes a number); hnsw follows a graph (hnsw_sq8: 1 byte
    a number); ivf_pq looks into lists of 4-bit codes and reranks the best with 1 byte a number.
    """

    kind: FaissKind = "fp16"  # memory, speed and exactness: `sd-search data plan` compares them
    effort: int | None = None  # HNSW's efSearch, IVF's nprobe; None: 64
    hnsw_links: int = 32  # of a passage
    hnsw_build_effort: int = 80  # efConstruction
    num_lists: int | None = None  # of ivf_pq; None: the power of two next to 4 sqrt(N)
    rerank_factor: int = 10  # of ivf_pq: how many candidates for one result are reranked
    training_rows: int = 1 << 20  # at most; drawn at random
    seed: int = 0  # of what is trained


def write_vector_index(directory: Path, vectors: VectorShards, config: VectorIndexConfig) -> dict[str, Any]:
    """Write dense/index.faiss and dense/encoder below `directory`; the settings for the manifest
    (`vector_index_settings`).

    HNSW's graph depends on the timing of FAISS's threads; the other kinds give the same bytes again.
    """
    factory = factory_string(config, len(vectors), vectors.dim)
    index = faiss.index_factory(vectors.dim, factory, faiss.METRIC_INNER_PRODUCT)
    _configure(index, config)
    if not index.is_trained:
        sample = training_sample(vectors, config)
        log.info("training %s on %d vectors", factory, len(sample))
        index.train(sample)
    for block in vectors.blocks(_BLOCK_ROWS):
        index.add(block)
        log.info("%s: %d of %d vectors", factory, index.ntotal, len(vectors))
    settings = vector_index_settings(vectors, config)
    set_effort(index, config.kind, settings["index"]["effort"])
    path = directory / INDEX_NAME
    path.parent.mkdir()
    faiss.write_index(index, str(path))
    shutil.copytree(vectors.directory / "encoder", directory / ENCODER_DIRECTORY)
    return settings


def vector_index_settings(vectors: VectorShards, config: VectorIndexConfig) -> dict[str, Any]:
    """What the manifest says of an index: its encoder, its kind and how hard it looks."""
    effort = 64 if config.effort is None else config.effort
    factory = factory_string(config, len(vectors), vectors.dim)
    index = {"kind": config.kind, "factory": factory, "effort": effort, "dim": vectors.dim}
    return {"encoder": vectors.manifest.settings["encoder"], "index": index}


def factory_string(config: VectorIndexConfig, num_vectors: int, dim: int) -> str:
    """FAISS's name for the index."""
    if config.kind == "ivf_pq":
        return f"IVF{num_lists(config, num_vectors)},PQ{num_codes(dim)}x4fs,Refine(SQ8)"
    names = {"flat": "Flat", "fp16": "SQfp16", "sq8": "SQ8"}
    names |= {"hnsw": f"HNSW{config.hnsw_links}", "hnsw_sq8": f"HNSW{config.hnsw_links},SQ8"}
    return names[config.kind]


def num_lists(config: VectorIndexConfig, num_vectors: int) -> int:
    """Lists of an IVF index: as asked for, or the power of two next to 4 sqrt(N) that leaves each list
    enough points.

    Raises ConfigError when there are fewer vectors than lists.
    """
    if config.num_lists is not None:
        if not 1 <= config.num_lists <= num_vectors:
            raise ConfigError(
                f"num_lists: found {config.num_lists}, expected 1 to {num_vectors}, the number of vectors"
            )
        return config.num_lists
    wanted = 2 ** round(np.log2(4 * np.sqrt(num_vectors)))
    affordable = max(1, min(num_vectors, config.training_rows) // _POINTS_PER_LIST)
    return int(min(wanted, 2 ** int(np.log2(affordable))))


def check_trainable(num_vectors: int, config: VectorIndexConfig) -> None:
    """Raise DataError for fewer vectors than ivf_pq is trained on: one for each list, and one for each
    value of a code."""
    if config.kind != "ivf_pq":
        return
    lists = num_lists(config, num_vectors)
    needed, found = max(lists, _CODE_VALUES), min(num_vectors, config.training_rows)
    if found < needed:
        rows = (
            f"{num_vectors} vectors"
            if found == num_vectors
            else f"training_rows {found} of {num_vectors} vectors"
        )
        raise DataError(
            f"vector_index.kind ivf_pq: found {rows}, expected at least {needed} to train {lists} lists and"
            f" codes of {_CODE_VALUES} values; choose kind flat, fp16 or hnsw, which need no training, or"
            " raise what is too small"
        )


def num_codes(dim: int) -> int:
    """4-bit codes a vector: a quarter of the dimension, or the next number below that divides it."""
    return next(count for count in range(max(1, dim // 4), 0, -1) if dim % count == 0)


def _configure(index: faiss.Index, config: VectorIndexConfig) -> None:
    if config.kind.startswith("hnsw"):
        index.hnsw.efConstruction = config.hnsw_build_effort
    if config.kind == "ivf_pq":
        index.k_factor = config.rerank_factor
        faiss.extract_index_ivf(index).cp.seed = config.seed


def training_sample(vectors: VectorShards, config: VectorIndexConfig) -> np.ndarray:
    """[at most training_rows, dim] vectors drawn without replacement."""
    size = min(len(vectors), config.training_rows)
    rows = np.random.default_rng(config.seed).choice(len(vectors), size, replace=False)
    return vectors.take(np.sort(rows))


def exact_search(vectors: VectorShards, queries: np.ndarray, top_k: int) -> np.ndarray:
    """Rows [Q, top_k] of the largest inner products, block by block, ties by row."""
    best_scores = np.full((len(queries), 0), -np.inf, np.float32)
    best_rows = np.zeros((len(queries), 0), np.int64)
    for start, block in _numbered(vectors):
        own = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        scores = np.concatenate([best_scores, queries @ block.T], axis=1)
        rows = np.concatenate([best_rows, own], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        best_scores, best_rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    return best_rows


def _numbered(vectors: VectorShards) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for block in vectors.blocks(_BLOCK_ROWS):
        yield start, block
        start += len(block)


def recall(found: list[list[int]], exact: np.ndarray) -> float:
    """Mean share of the exact rows [Q, K] among the rows found for each query."""
    return float(
        np.mean(
            [len(set(own) & set(rows.tolist())) / len(rows) for own, rows in zip(found, exact, strict=True)]
        )
    )
