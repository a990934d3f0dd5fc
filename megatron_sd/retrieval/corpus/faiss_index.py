"""What building and searching a FAISS index share."""

from __future__ import annotations

from typing import Literal

import faiss
import numpy as np

from megatron_sd.retrieval.corpus.fusion import Ranking

DENSE_DIRECTORY = "dense"
INDEX_NAME = f"{DENSE_DIRECTORY}/index.faiss"
ENCODER_DIRECTORY = f"{DENSE_DIRECTORY}/encoder"
# the search parameter of an index kind
EFFORTS = {"hnsw": "efSearch", "hnsw_sq8": "efSearch", "ivf_pq": "nprobe"}
FaissKind = Literal["flat", "fp16", "sq8", "hnsw", "hnsw_sq8", "ivf_pq"]


def sorted_ranking(rows: np.ndarray, scores: np.ndarray) -> Ranking:
    """What FAISS found ([K] rows, [K] scores) in the order of the project; FAISS fills up with row -1 when
    it finds too few."""
    found = rows >= 0
    rows, scores = rows[found], scores[found]
    order = np.lexsort((rows, -scores))
    return Ranking(rows=rows[order].tolist(), scores=scores[order].tolist())


def set_effort(index: faiss.Index, kind: FaissKind, effort: int | None, top_k: int = 1) -> None:
    """Set how many candidates an approximate index looks at; of a graph at least `top_k`, below which it
    finds fewer."""
    if effort is not None and EFFORTS.get(kind) == "efSearch":
        effort = max(effort, top_k)
    if effort is not None and kind in EFFORTS:
        faiss.ParameterSpace().set_index_parameter(index, EFFORTS[kind], effort)


def on_one_gpu(index: faiss.Index, number: int) -> faiss.Index:
    """The index on one GPU, in half precision, where FAISS has GPU code and knows the kind; else as it is."""
    if not _has_gpu_code(index):
        return index
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index, options)


def on_gpus(index: faiss.Index) -> faiss.Index:
    """The index on all GPUs, in shards of half precision, where FAISS has GPU code and knows the kind; else
    as it is. For a process that has the GPUs for itself: a retriever service, no training rank."""
    if not _has_gpu_code(index):
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = True
    return faiss.index_cpu_to_all_gpus(index, options)


def _has_gpu_code(index: faiss.Index) -> bool:
    return getattr(faiss, "get_num_gpus", lambda: 0)() > 0 and isinstance(
        index, faiss.IndexFlat | faiss.IndexIVF
    )
