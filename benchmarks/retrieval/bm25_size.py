"""What a BM25 index costs as it grows: opening, searches a core-second, resident memory at 200,000 and
1,000,000 passages.

    python -m benchmarks.retrieval.bm25_size

Passages of 100 words drawn by Zipf's law from 60,000; the postings are laid out by numpy with random
scores, since search and memory do not depend on their values. Queries: six words from the rarer half of a
random passage, top 3. Not a comparison: it prints what docs/retrieval.md and `sd-search data plan` scale
from.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from data_prep.passages.index import IndexConfig, bm25_settings
from megatron_sd.retrieval.corpus.bm25 import Bm25Index

SIZES, PASSAGE_WORDS, NUM_WORDS = (200_000, 1_000_000), 100, 60_000
NUM_QUERIES, QUERY_WORDS, TOP_K = 1_000, 6, 3
WIKIPEDIA_PASSAGES = 21_015_324


def write_postings(directory: Path, num_passages: int, rng: np.random.Generator) -> np.ndarray:
    """The files of an index below `directory`; the words [NUM_QUERIES, PASSAGE_WORDS] of its first
    passages."""
    weights = 1.0 / np.arange(2, NUM_WORDS + 2)
    bounds = np.cumsum(weights / weights.sum())
    words = np.empty(num_passages * PASSAGE_WORDS, np.uint16)
    for block in np.array_split(words, 1 + len(words) // 10_000_000):
        block[:] = np.minimum(np.searchsorted(bounds, rng.random(len(block))), NUM_WORDS - 1)
    path = directory / "bm25"
    path.mkdir(parents=True)
    np.save(path / "rows.npy", (np.argsort(words, kind="stable") // PASSAGE_WORDS).astype(np.int32))
    np.save(path / "scores.npy", rng.random(len(words), dtype=np.float32) + np.float32(0.1))
    np.save(
        path / "starts.npy",
        np.concatenate([[0], np.cumsum(np.bincount(words, minlength=NUM_WORDS))]).astype(np.int64),
    )
    (path / "vocabulary.json").write_text(json.dumps([f"w{word}" for word in range(NUM_WORDS)]))
    return words[: NUM_QUERIES * PASSAGE_WORDS].reshape(NUM_QUERIES, PASSAGE_WORDS)


def resident_mib() -> float:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(directory: Path, num_passages: int, rng: np.random.Generator) -> float:
    """Print the figures of one size; the bytes of its files a passage."""
    passages = write_postings(directory, num_passages, rng)
    before_mib, started = resident_mib(), time.perf_counter()
    index = Bm25Index(directory, vars(bm25_settings(IndexConfig(passages="", output=""))), num_passages)
    open_s = time.perf_counter() - started
    rarer = np.sort(passages)[:, PASSAGE_WORDS // 2 :]
    queries = [
        index.term_ids(" ".join(f"w{word}" for word in rng.choice(own, QUERY_WORDS, replace=False)))
        for own in rarer
    ]
    for query in queries:
        index.search_terms(query, TOP_K)
    touched_mib, started = resident_mib() - before_mib, time.process_time()
    for query in queries:
        index.search_terms(query, TOP_K)
    qps = len(queries) / (time.process_time() - started)
    num_bytes = sum(path.stat().st_size for path in (directory / "bm25").iterdir())
    print(
        f"{num_passages:>10,} passages: open {open_s:.3f} s, {qps:,.0f} queries a core-second, files"
        f" {num_bytes / 1e6:,.0f} MB, resident after {NUM_QUERIES:,} queries +{touched_mib:,.0f} MiB",
        flush=True,
    )
    return num_bytes / num_passages


def main() -> None:
    """Measure every size and extrapolate."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder) / "warm-up", 1_000, rng)  # compiles the search loop
        for size in SIZES:
            bytes_per_passage = measure(Path(folder) / str(size), size, rng)
    print(
        f"{WIKIPEDIA_PASSAGES:,} passages: {bytes_per_passage * WIKIPEDIA_PASSAGES / 1e9:.1f} GB of postings,"
        " extrapolated"
    )


if __name__ == "__main__":
    main()
