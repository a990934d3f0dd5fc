"""A corpus directory, verified, mapped and searched in this process."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, RetrievalError
from megatron_sd.records import Hit
from megatron_sd.retrieval.corpus.bm25 import BM25_FILES, Bm25Index
from megatron_sd.retrieval.corpus.fusion import Ranking, reciprocal_rank_fusion
from megatron_sd.retrieval.corpus.manifest import Manifest, read_manifest, verify_files
from megatron_sd.retrieval.corpus.passages import PASSAGES_NAME, PassageStore

if TYPE_CHECKING:
    from megatron_sd.retrieval.reranker import Reranker


EXHAUSTIVE_KINDS = ("flat", "fp16", "sq8")  # of a vector index: a query reads all of it
MOST_SCANNED = 1_000_000  # vectors that a rank reads for one query: beyond, a step waits for minutes


class Index(Protocol):
    """One way to search the rows of a corpus. An object serves one thread."""

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """The best rows of each query, best first, ties by row."""
        ...


class CorpusRetriever:
    """Searches a corpus directory inline, by BM25, by vectors or by both, and puts what it finds into a
    reranker's order where one is configured.

    `corpus_version` is the SHA-256 of the manifest, or of that and of the reranker, `passages` the store,
    `method` how it is searched. Threads may share one: they search in turn.
    """

    def __init__(
        self,
        corpus: Path | str,
        search: SearchConfig,
        progress: Callable[[str], None] | None = None,
        *,
        shares_gpus: bool = False,
    ) -> None:
        """Verify and map the corpus; progress is told, line by line, what is being done. shares_gpus: this
        process trains or samples, too, so the vectors stay off the GPUs of others (dense.py).

        Raises DataError that names a missing, truncated or corrupt file, ConfigError for a method the
        corpus was not built for.
        """
        directory = Path(corpus)
        say = progress or (lambda line: None)
        self.manifest, self.corpus_version = read_manifest(directory, "corpus")
        self.method = _method(directory, self.manifest, search)
        required = [PASSAGES_NAME, *(BM25_FILES if self.method != "dense" else ())]
        verify_files(directory, self.manifest, required, progress)
        say("mapping the passages")
        self.passages = PassageStore(directory / PASSAGES_NAME)
        self._indexes = [
            OPENERS[name](directory, self.manifest, search, say, shares_gpus=shares_gpus)
            for name in PARTS[self.method]
        ]
        self._search = search
        self._one_at_a_time = threading.Lock()
        self._reranker = _open_reranker(search, say)
        if self._reranker is not None:
            told = f"{self.corpus_version} reranked by {self._reranker.digest}"
            self.corpus_version = hashlib.sha256(told.encode()).hexdigest()

    def find(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` passages of each query, best first, ties by passage id; fewer when the corpus
        matches no more. Scores and order are the reranker's, if there is one.

        Raises RetrievalError when top_k is below 1.
        """
        if top_k < 1:
            raise RetrievalError(f"top_k is {top_k}, expected at least 1")
        with self._one_at_a_time:
            if self._reranker is None:
                return [self._hits(ranking) for ranking in self._rank(queries, top_k)]
            depth = max(top_k, self._reranker.depth)
            found = [self._hits(ranking) for ranking in self._rank(queries, depth)]
            return self._reranker.rerank(queries, found, top_k)

    @property
    def rerank_depth(self) -> int:
        """Passages of a query that a reranker reads; 0 without one."""
        return 0 if self._reranker is None else self._reranker.depth

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """`find`, answered inline: it never waits, so rollouts stay a function of their seed."""
        return self.find(queries, top_k)

    def document(self, passage_id: str) -> str | None:
        """Title and text of the document that a passage is of, its chunks (ID#0000, ...) one after the other;
        None for an unknown id. Chunks that overlap are shown as they are."""
        own = passage_id.rpartition("#")[0] or passage_id
        found = [
            p for p in self.passages.between(own, f"{own}#~") if p.id == own or p.id.startswith(f"{own}#")
        ]
        return "\n".join([found[0].title, *(passage.text for passage in found)]) if found else None

    def _rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        if len(self._indexes) == 1:
            return self._indexes[0].rank(queries, top_k)
        depth = max(top_k, self._search.fusion_depth)
        rankings = zip(*(index.rank(queries, depth) for index in self._indexes), strict=True)
        return [reciprocal_rank_fusion(own, top_k, constant=self._search.fusion_constant) for own in rankings]

    def _hits(self, ranking: Ranking) -> tuple[Hit, ...]:
        passages = self.passages.take(ranking.rows)
        return tuple(
            Hit(passage=passage, score=score) for passage, score in zip(passages, ranking.scores, strict=True)
        )


def _open_bm25(
    directory: Path,
    manifest: Manifest,
    search: SearchConfig,
    say: Callable[[str], None],
    *,
    shares_gpus: bool,
) -> Index:
    say("mapping the BM25 index")
    return Bm25Index(directory, manifest.settings["bm25"], manifest.num_passages)


def _open_dense(
    directory: Path,
    manifest: Manifest,
    search: SearchConfig,
    say: Callable[[str], None],
    *,
    shares_gpus: bool,
) -> Index:
    kind = manifest.settings["dense"]["index"]["kind"]
    if shares_gpus and kind in EXHAUSTIVE_KINDS and manifest.num_passages > MOST_SCANNED:
        raise ConfigError(
            f"retriever.corpus: found {manifest.num_passages:,} vectors of kind {kind} in {directory}, all of which"
            f" every query would read inside a rank, expected at most {MOST_SCANNED:,}: serve the corpus (`sd-search"
            " retriever serve --corpus DIR`) and name it in retriever.endpoints, or build it with"
            " vector_index.kind hnsw_sq8 or ivf_pq"
        )
    # imports torch, which a BM25 service does without
    from megatron_sd.retrieval.corpus.dense import DenseIndex

    say("opening the encoder and the vector index")
    return DenseIndex(directory, manifest, search, shares_gpus=shares_gpus)


def _open_reranker(search: SearchConfig, say: Callable[[str], None]) -> Reranker | None:
    if search.rerank is None:
        return None
    # imports torch, which a BM25 service does without
    from megatron_sd.retrieval.corpus.encoder import choose_device
    from megatron_sd.retrieval.reranker import Reranker

    say("opening the reranker")
    return Reranker(search.rerank, choose_device(search.device))


OPENERS = {"bm25": _open_bm25, "dense": _open_dense}
PARTS = {"bm25": ("bm25",), "dense": ("dense",), "hybrid": ("bm25", "dense")}


def _method(directory: Path, manifest: Manifest, search: SearchConfig) -> str:
    """The method asked for, or the best the corpus has. Raises ConfigError when the corpus was not built
    for it."""
    has = [name for name in ("dense", "bm25") if name in manifest.settings]
    method = has[0] if search.method == "auto" and has else search.method
    missing = [name for name in PARTS.get(method, ("bm25",)) if name not in has]
    if missing:
        raise ConfigError(
            f"search.method: found {search.method!r}; {directory} has no {missing[0]} index, but"
            f" {', '.join(has) or 'none'}; choose another method or build the corpus with it (`sd-search data"
            " index`)"
        )
    return method
