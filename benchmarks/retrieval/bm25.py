"""BM25 search against bm25s's own numba backend, on the same index and queries, in turn in one process, one
thread each.

    python -m benchmarks.retrieval.bm25 [--json FILE]

60,000 passages of 80 words drawn by Zipf's law from 60,000 words; queries of 4 and of 12 words drawn from a
random passage, top 3. Both sides start from term ids. Their scores are compared too: they must be equal bit
for bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bm25s
import numpy as np

from benchmarks.baseline import Comparison, report
from data_prep.passages.index import IndexConfig, Labels, bm25_settings, write_corpus
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.bm25 import Bm25Index
from megatron_sd.retrieval.corpus.manifest import read_manifest

NUM_PASSAGES, PASSAGE_WORDS, NUM_WORDS, TOP_K = 60_000, 80, 60_000, 3
NUM_QUERIES, QUERY_WORDS, NUM_ROUNDS = 1_000, (4, 12), 5


def zipf_passages(rng: np.random.Generator) -> np.ndarray:
    """[NUM_PASSAGES, PASSAGE_WORDS] word numbers; word n has probability proportional to 1 / (n + 2)."""
    weights = 1.0 / np.arange(2, NUM_WORDS + 2)
    return rng.choice(NUM_WORDS, size=(NUM_PASSAGES, PASSAGE_WORDS), p=weights / weights.sum())


def build(words: np.ndarray, directory: Path) -> Bm25Index:
    """Our index over the passages."""
    passages = (
        Passage(id=f"{i:08}", title="", text=" ".join(f"w{word}" for word in row))
        for i, row in enumerate(words)
    )
    settings = bm25_settings(IndexConfig(passages="", output="", stop_words="none", stemmer="none"))
    write_corpus(directory / "corpus", passages, settings, Labels(sources=("synthetic",)))
    manifest, _ = read_manifest(directory / "corpus", "corpus")
    return Bm25Index(directory / "corpus", manifest.settings["bm25"], manifest.num_passages)


def theirs_over(index: Bm25Index) -> bm25s.BM25:
    """bm25s over the very same arrays."""
    scores, rows, starts = index.index
    theirs = bm25s.BM25(method="lucene", backend="numba")
    theirs.scores = {"data": scores, "indices": rows, "indptr": starts, "num_docs": NUM_PASSAGES}
    theirs.nonoccurrence_array = None
    theirs.vocab_dict = {}
    theirs.unique_token_ids_set = set(range(len(starts) - 1))
    return theirs


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(index: Bm25Index, queries: list[list[int]], num_words: int) -> Comparison:
    """Microseconds a query, median of the rounds."""
    theirs = theirs_over(index)

    def search_ours() -> list[np.ndarray]:
        return [index.search_terms(terms, TOP_K)[1] for terms in queries]

    def search_theirs() -> np.ndarray:
        return theirs.retrieve(queries, k=TOP_K, show_progress=False, n_threads=1).scores

    assert np.array_equal(np.stack(search_ours()), search_theirs()), "scores differ"
    rounds = [(seconds(search_ours), seconds(search_theirs)) for _ in range(NUM_ROUNDS)]
    ours_us, theirs_us = (statistics.median(side) / len(queries) * 1e6 for side in zip(*rounds, strict=True))
    return Comparison(
        name=f"BM25 query of {num_words} words",
        ours=ours_us,
        theirs=theirs_us,
        unit="us",
        against="bm25s numba",
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    words = zipf_passages(rng)
    comparisons = []
    with tempfile.TemporaryDirectory() as directory:
        index = build(words, Path(directory))
        for num_words in QUERY_WORDS:
            chosen = words[rng.integers(NUM_PASSAGES, size=NUM_QUERIES), :num_words]
            queries = [index.term_ids(" ".join(f"w{word}" for word in row)) for row in chosen]
            comparisons.append(compare(index, queries, num_words))
    report("bm25", comparisons, arguments.json)


if __name__ == "__main__":
    main()
