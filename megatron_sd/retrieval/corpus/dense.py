"""Vector search of a corpus directory: the query encoder and a FAISS index, memory-mapped.

dense/index.faiss   row i is the vector of passage i; inner product
dense/encoder/*     the encoder that made the vectors, so that no other can meet them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import torch

from megatron_sd.config import SearchConfig
from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.encoder import Encoder, EncoderSettings, choose_device
from megatron_sd.retrieval.corpus.faiss_index import (
    EFFORTS,
    ENCODER_DIRECTORY,
    INDEX_NAME,
    on_gpus,
    on_one_gpu,
    set_effort,
    sorted_ranking,
)
from megatron_sd.retrieval.corpus.fusion import Ranking
from megatron_sd.retrieval.corpus.manifest import Manifest


class DenseIndex:
    """Searches the vectors of a verified corpus directory with its `encoder`. One object serves one
    thread."""

    def __init__(
        self, directory: Path, manifest: Manifest, search: SearchConfig, *, shares_gpus: bool
    ) -> None:
        """Open encoder and index; shares_gpus: see `place`. Raises DataError when they do not fit each
        other or the corpus."""
        settings = manifest.settings["dense"]
        device = choose_device(search.device)
        self.encoder = Encoder(directory / ENCODER_DIRECTORY, EncoderSettings(**settings["encoder"]), device)
        index = faiss.read_index(str(directory / INDEX_NAME), faiss.IO_FLAG_MMAP_IFC)
        if index.d != self.encoder.dim:
            raise DataError(
                f"{directory}: its vectors have {index.d} dimensions, its encoder {self.encoder.dim}: build"
                " again"
            )
        if index.ntotal != manifest.num_passages:
            raise DataError(
                f"{directory}: found {index.ntotal} vectors of {manifest.num_passages} passages: build it"
                " again"
            )
        self._kind, self._effort = settings["index"]["kind"], search.effort or settings["index"]["effort"]
        set_effort(index, self._kind, self._effort)
        self._index = place(index, device, search, shares_gpus=shares_gpus)
        self._most_hits = 1  # that the effort is set for

    def _reach(self, top_k: int) -> None:
        """A graph searched with less effort than hits are asked for would find fewer."""
        if EFFORTS.get(self._kind) == "efSearch" and top_k > self._most_hits:
            set_effort(self._index, self._kind, self._effort, top_k)
            self._most_hits = top_k

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """The best rows of each query by inner product, best first, ties by row."""
        if not queries:
            return []
        self._reach(top_k)
        scores, rows = self._index.search(
            self.encoder.encode_queries(queries), min(top_k, self._index.ntotal)
        )
        return [sorted_ranking(*own) for own in zip(rows, scores, strict=True)]


def place(
    index: faiss.Index, device: torch.device, search: SearchConfig, *, shares_gpus: bool
) -> faiss.Index:
    """Where the vectors are searched. A process that has the GPUs for itself spreads them over all; one
    that trains or samples, too, takes its own GPU alone, and only where search.device says cuda: the memory
    is planned for training."""
    if device.type != "cuda":
        return index
    if not shares_gpus:
        return on_gpus(index)
    return on_one_gpu(index, device.index) if search.device == "cuda" else index
