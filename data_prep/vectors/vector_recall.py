"""How much of what exact search finds an approximate index finds, on questions that took no part in
building it."""

from __future__ import annotations

from pathlib import Path

from data_prep.vectors.vector_index import exact_search, recall
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import SearchConfig
from megatron_sd.retrieval.corpus.dense import DenseIndex
from megatron_sd.retrieval.corpus.manifest import read_manifest
from megatron_sd.search.questions import load_questions


def measure_recall(corpus: Path, vectors: VectorShards, questions: str, *, limit: int, top_k: int) -> float:
    """Mean share of the exact `top_k` rows among those the corpus's index finds for the first `limit`
    questions.

    Raises DataError for a broken questions file.
    """
    manifest, _ = read_manifest(corpus, "corpus")
    index = DenseIndex(corpus, manifest, SearchConfig(method="dense"), shares_gpus=False)
    queries = [question.text for question in load_questions(questions, limit=limit)]
    exact = exact_search(vectors, index.encoder.encode_queries(queries), top_k)
    return recall([list(ranking.rows) for ranking in index.rank(queries, top_k)], exact)
