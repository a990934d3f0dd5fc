"""BM25 over a corpus directory, in process, memory-mapped and deterministic.

`bm25s` scores every posting when the index is built (Lucene's variant); a query then only adds up
precomputed numbers. The search loop is our own, because bm25s breaks ties arbitrarily: this one orders
equal scores by passage id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bm25s
import numba
import numpy as np
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from megatron_sd.errors import DataError
from megatron_sd.retrieval.corpus.fusion import Ranking
from megatron_sd.retrieval.corpus.words import compile_pattern, is_uncut

BM25_DIRECTORY = "bm25"
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for DEBUG when imported
log = logging.getLogger(__name__)
_UNCUT = (
    "%s mainly in a script without spaces (Chinese, Japanese, Thai, ...), and token_pattern %r makes whole"
    " clauses one word, which hardly any query finds: index with a token_pattern that cuts them, such as the"
    " one in docs/retrieval.md"
)
_BLOCK_ROWS = 512
_ARRAYS = ("scores", "rows", "starts")
BM25_FILES = tuple(
    f"{BM25_DIRECTORY}/{name}" for name in ("vocabulary.json", *(f"{array}.npy" for array in _ARRAYS))
)


@dataclass(frozen=True, kw_only=True)
class Bm25Settings:
    """How text becomes terms and how terms are scored; stored in the manifest, so a query is read as the
    corpus was.

    stop_words: drop bm25s's English list. stemmer: Snowball's English stemmer. token_pattern: regular
    expression whose matches in the lower-cased text are the words. k1, b: BM25's saturation and length
    normalisation.
    """

    stop_words: Literal["english", "none"]
    stemmer: Literal["english", "none"]
    token_pattern: str
    k1: float
    b: float


class Analyzer:
    """Text to terms, the same for passages and queries."""

    def __init__(self, settings: Bm25Settings) -> None:
        """Raises ConfigError for a token_pattern that is none."""
        self._find_words = compile_pattern(settings.token_pattern).findall
        self._stop_words = frozenset(STOPWORDS_EN if settings.stop_words == "english" else ())
        self._stem = Stemmer.Stemmer("english").stemWords if settings.stemmer == "english" else list

    def terms(self, text: str) -> list[str]:
        """The terms of a text in order, repetitions included."""
        return self._stem([word for word in self._find_words(text.lower()) if word not in self._stop_words])


@numba.njit(nogil=True, fastmath={"nnan", "nsz"})
def _largest(block):
    """The largest of some scores, which are finite: eight at a time."""
    largest = np.float32(0)
    for score in block:
        largest = max(largest, score)
    return largest


@numba.njit(nogil=True)
def _top_rows(terms, index, totals, top_k):
    """Rows and scores of the best passages: larger score first, then smaller row.

    terms: [T] int64. index: (scores [P] float32, rows [P] int32, starts [V + 1] int64), the postings of
    term t being starts[t]:starts[t + 1]. totals: [N] float32 workspace, whatever it holds. Rows are visited
    in rising order, so a later row must score more than an earlier one to come before it. Most blocks of
    rows hold nothing better and are passed over whole.
    """
    scores, rows, starts = index
    totals[:] = 0
    for term in terms:
        for posting in range(starts[term], starts[term + 1]):
            totals[rows[posting]] += scores[posting]
    best_rows = np.zeros(top_k, np.int32)
    best_scores = np.zeros(top_k, np.float32)  # every score is positive, so 0 marks a free place
    num_kept = 0
    worst = np.float32(0)
    # An insertion into a short sorted list, and a whole block at a time where its largest score is too
    # small: a partition of all N scores would write N entries for each query.
    for start in range(0, len(totals), _BLOCK_ROWS):
        block = totals[start : start + _BLOCK_ROWS]
        if _largest(block) <= worst:
            continue
        for offset in range(len(block)):
            total = block[offset]
            if total > worst:
                num_kept = min(num_kept + 1, top_k)
                place = num_kept - 1
                while place > 0 and total > best_scores[place - 1]:
                    best_rows[place] = best_rows[place - 1]
                    best_scores[place] = best_scores[place - 1]
                    place -= 1
                best_rows[place] = start + offset
                best_scores[place] = total
                worst = best_scores[top_k - 1]
    return best_rows[:num_kept], best_scores[:num_kept]


def write_bm25(directory: Path, texts: Iterable[str], settings: Bm25Settings) -> int:
    """Index the texts of rows 0, 1, ... into `directory`/bm25 and return the number of distinct terms.

    The same texts and settings give the same bytes. Raises DataError when no text holds a term.
    """
    analyzer = Analyzer(settings)
    vocabulary: dict[str, int] = {}
    term_ids: list[list[int]] = []
    num_uncut = 0
    for text in texts:
        terms = analyzer.terms(text)
        num_uncut += is_uncut(text, terms)
        term_ids.append([vocabulary.setdefault(term, len(vocabulary)) for term in terms])
    if 2 * num_uncut > len(term_ids):
        log.warning(_UNCUT, f"{num_uncut} of {len(term_ids)} passages are", settings.token_pattern)
    if not vocabulary:
        raise DataError(
            f"no passage holds a term under {settings}: nothing to index; change the settings or the passages"
        )
    index = bm25s.BM25(method="lucene", k1=settings.k1, b=settings.b)
    index.index((term_ids, vocabulary), create_empty_token=False, show_progress=False)
    path = directory / BM25_DIRECTORY
    path.mkdir(parents=True, exist_ok=True)
    arrays = {"scores": np.float32, "rows": np.int32, "starts": np.int64}
    for (name, dtype), source in zip(arrays.items(), ("data", "indices", "indptr"), strict=True):
        np.save(path / f"{name}.npy", index.scores[source].astype(dtype, copy=False), allow_pickle=False)
    (path / "vocabulary.json").write_text(
        json.dumps(list(vocabulary), ensure_ascii=False, indent=0), encoding="utf-8"
    )
    return len(vocabulary)


class Bm25Index:
    """Searches a corpus directory's BM25 index: no threads, no waiting, the same answer every time.

    `index` holds the postings (scores [P] float32, rows [P] int32, starts [V + 1] int64). One object serves
    one thread.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], num_passages: int) -> None:
        """Map the index of a verified corpus directory. Raises DataError for settings of something else."""
        try:
            own = Bm25Settings(**settings)
            self._analyzer, self._pattern = Analyzer(own), own.token_pattern
        except TypeError as error:
            raise DataError(
                f"{directory}: its manifest has no settings of a BM25 index ({error}): build it again"
            ) from error
        words = json.loads((directory / BM25_DIRECTORY / "vocabulary.json").read_text(encoding="utf-8"))
        self._vocabulary = {word: term for term, word in enumerate(words)}
        self.index = tuple(
            np.asarray(np.load(directory / BM25_DIRECTORY / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in _ARRAYS
        )
        self._has_warned = False
        self._totals = np.zeros(num_passages, np.float32)
        self.search_terms((), top_k=1)  # compiles the search loop, about a second

    def term_ids(self, query: str) -> list[int]:
        """The indexed terms of a query, in order, repetitions included."""
        terms = self._analyzer.terms(query)
        if not self._has_warned and is_uncut(query, terms):
            self._has_warned = True
            log.warning(_UNCUT, f"the query {query!r} is", self._pattern)
        return [self._vocabulary[term] for term in terms if term in self._vocabulary]

    def search_terms(self, term_ids: Sequence[int], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [K] int32 and scores [K] float32 of the best passages, K <= top_k; empty without a term."""
        return _top_rows(np.array(term_ids, dtype=np.int64), self.index, self._totals, top_k)

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """The best rows of each query, best first, ties by row; none when no term matches."""
        found = [self.search_terms(self.term_ids(query), top_k) for query in queries]
        return [Ranking(rows=rows.tolist(), scores=scores.tolist()) for rows, scores in found]
