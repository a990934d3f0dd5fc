"""An OpenSearch index, for those who outgrow one node: BM25 there, or vectors there and their encoder here.

`sd-search data upload` fills an index. Its mapping says which passages and vectors it holds, and every
document carries the version of its passages; an answer from others is refused. Needs the extra
`[opensearch]`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensearchpy import OpenSearch
from opensearchpy.exceptions import ImproperlyConfigured, NotFoundError, OpenSearchException

from megatron_sd.config import OpenSearchConfig
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.corpus.manifest import open_manifest
from megatron_sd.retrieval.remote.client import read_token

logging.getLogger("opensearch").setLevel(logging.ERROR)  # it tells of every request, and of every retry
TEXT_FIELDS = ("passage_id", "title", "text", "passages_version")  # of every document
CONTENTS, VECTOR = "contents", "vector"  # what BM25 and k-NN look into
_RETRIED = (429, 502, 503, 504)
_ADVICE = "fill it with `sd-search data upload`"


@dataclass(frozen=True, kw_only=True)
class IndexContents:
    """What the mapping of an index says it holds. vectors_version: None without vectors."""

    passages_version: str
    vectors_version: str | None
    num_passages: int


class OpenSearchRetriever:
    """Searches an index. `corpus_version` is the version of the vectors it was filled from, for BM25 that
    of the passages.

    One thread encodes and asks, so rollouts go on meanwhile.
    """

    def __init__(self, config: OpenSearchConfig, client: OpenSearch) -> None:
        """Ask what the index holds, and open the encoder of `config.vectors`.

        Raises RetrievalError when the server cannot be asked, the index is no upload, is unfinished or
        holds other vectors; DataError for damaged vectors, ConfigError for a k-NN search without them.
        """
        self._config = config
        self._client = client
        held = read_contents(client, config)
        if held is None:
            raise RetrievalError(f"{place(config)} does not exist; {_ADVICE}")
        num_passages = ask(config, lambda: client.count(index=config.index)["count"])
        if num_passages != held.num_passages:
            raise RetrievalError(
                f"{place(config)} holds {num_passages} of {held.num_passages} passages: upload them again"
            )
        self._passages_version = self.corpus_version = held.passages_version
        self._encoder = None
        if config.method == "knn":
            self._encoder, self.corpus_version = _open_encoder(config, held)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opensearch")

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """The best `top_k` passages of each query, best first, ties by id. Scores are Lucene's BM25, or
        inner products.

        Raises RetrievalError when the index cannot be asked, answers for a part of its shards only, or
        holds something else.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self.find, tuple(queries), top_k
        )

    def find(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        """`search` in the calling thread."""
        lines: list[Mapping[str, Any]] = []
        for order in self._orders(queries, top_k):
            fields = {"size": top_k, "_source": list(TEXT_FIELDS), "track_total_hits": False}
            lines += [{"index": self._config.index}, order | fields]
        reply = ask(self._config, lambda: self._client.msearch(body=lines)) if lines else {"responses": []}
        responses = reply.get("responses") if isinstance(reply, dict) else None
        if not isinstance(responses, list) or len(responses) != len(queries):
            raise self._wrong(f"answered {_shown(reply)}, expected {len(queries)} responses")
        return [self._hits(response) for response in responses]

    def _orders(self, queries: Sequence[str], top_k: int) -> list[dict[str, Any]]:
        if self._encoder is None:
            in_order = {"sort": ["_score", {"passage_id": "asc"}], "track_scores": True}
            return [{"query": {"match": {CONTENTS: {"query": query}}}} | in_order for query in queries]
        vectors = self._encoder.encode_queries(queries)
        return [{"query": {"knn": {VECTOR: {"vector": vector.tolist(), "k": top_k}}}} for vector in vectors]

    def _hits(self, response: Any) -> tuple[Hit, ...]:
        if isinstance(response, dict) and "error" in response:
            raise self._wrong(f"refused a query: {_reason(response['error'])}")
        try:
            is_whole = not response["timed_out"] and response["_shards"]["failed"] == 0
            found = [(hit["_source"], hit["_score"]) for hit in response["hits"]["hits"]]
        except (KeyError, TypeError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise self._wrong(f"answered with another schema ({problem}): {_shown(response)}") from error
        if not is_whole:
            raise self._wrong(f"answered for a part of its shards only: {_shown(response['_shards'])}")
        hits = [Hit(passage=self._passage(source), score=self._score(score)) for source, score in found]
        return tuple(sorted(hits, key=lambda hit: (-hit.score, hit.passage.id)))

    def _score(self, score: Any) -> float:
        """OpenSearch's scores are positive: p + 1 for an inner product p above 0, 1 / (1 - p) for others."""
        if not isinstance(score, int | float) or not math.isfinite(score) or score <= 0:
            raise self._wrong(f"gave a hit the score {score!r}, expected a number above 0")
        if self._encoder is None:
            return float(score)
        return score - 1.0 if score > 1 else 1.0 - 1.0 / score

    def _passage(self, source: Any) -> Passage:
        fields = source if isinstance(source, dict) else {}
        missing = [name for name in TEXT_FIELDS if not isinstance(fields.get(name), str)]
        if missing:
            has = ", ".join(sorted(fields)) or "none"
            raise self._wrong(
                f"holds a document without the text field {missing[0]!r} (it has {has}); {_ADVICE}"
            )
        if fields["passages_version"] != self._passages_version:
            found, expected = fields["passages_version"][:16], self._passages_version[:16]
            raise self._wrong(f"holds a document of the passages {found}, expected {expected}")
        return Passage(id=fields["passage_id"], title=fields["title"], text=fields["text"])

    def _wrong(self, what: str) -> RetrievalError:
        return RetrievalError(f"{place(self._config)} {what}")


def _open_encoder(config: OpenSearchConfig, held: IndexContents) -> tuple[Any, str]:
    """The encoder of the vectors, and their version."""
    from megatron_sd.retrieval.corpus.encoder import (
        Encoder,
        EncoderSettings,
        choose_device,
    )  # imports torch, which BM25 does without

    if config.vectors is None:
        raise ConfigError(
            "opensearch.vectors: found nothing, expected, for knn, the vectors directory the index was filled"
            " from"
        )
    directory = Path(config.vectors)
    manifest, version = open_manifest(directory, "vectors")
    if held.vectors_version != version:
        found = "no vectors" if held.vectors_version is None else f"the vectors {held.vectors_version[:16]}"
        raise RetrievalError(f"{place(config)} holds {found}, expected {version[:16]}, those of {directory}")
    settings = EncoderSettings(**manifest.settings["encoder"])
    return Encoder(directory / "encoder", settings, choose_device(config.device)), version


def read_contents(client: OpenSearch, config: OpenSearchConfig) -> IndexContents | None:
    """What an index says it holds; None when it does not exist. Raises RetrievalError when it says
    nothing."""
    try:
        mappings = ask(config, lambda: client.indices.get_mapping(index=config.index))
    except RetrievalError as error:
        if isinstance(error.__cause__, NotFoundError):
            return None
        raise
    try:
        (mapping,) = mappings.values()  # an alias may stand for an index of another name
        return IndexContents(**mapping["mappings"]["_meta"]["sd_search"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RetrievalError(
            f"{place(config)} was not made by `sd-search data upload`: {_shown(mappings)}"
        ) from error


def ask(config: OpenSearchConfig, request: Callable[[], Any]) -> Any:
    """What a call of the client answers. Raises RetrievalError that says what the server said."""
    try:
        return request()
    except (OpenSearchException, KeyError, TypeError, ValueError) as error:
        raise RetrievalError(
            f"{place(config)} gave no answer: {type(error).__name__}: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    """The reason in the server's own words, where it gave one."""
    arguments = getattr(error, "args", ())
    details = arguments[2] if len(arguments) > 2 else None
    if isinstance(details, dict) and "error" in details:
        return f"status {arguments[0]}: {_reason(details['error'])}"
    return str(error)


def _reason(error: Any) -> str:
    """`type: reason` of an error object, which may also be plain text."""
    if isinstance(error, dict) and "type" in error:
        return f"{error['type']}: {error.get('reason')}"
    return _shown(error)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def place(config: OpenSearchConfig) -> str:
    """How errors call the index."""
    return f"OpenSearch index {config.index!r} at {config.url}"


def connect(config: OpenSearchConfig) -> OpenSearch:
    """A client of a server. Raises DataError for an address that cannot be one, or a login that cannot be
    read."""
    login = None
    if config.login_file is not None:
        user, colon, password = read_token(config.login_file).partition(":")
        if not (user and colon and password):
            raise DataError(
                f"opensearch.login_file: {config.login_file} holds no login; expected one line USER:PASSWORD"
            )
        login = (user, password)
    if not config.url.startswith(("http://", "https://")):
        raise DataError(
            f"opensearch.url: found {config.url!r}, expected http://host:port or https://host:port"
        )
    certificates = {} if config.ca_file is None else {"ca_certs": config.ca_file}
    try:
        return OpenSearch(
            hosts=[config.url],
            http_auth=login,
            timeout=config.deadline_s,
            max_retries=3,  # of connections that fail at once; a deadline that has passed is not begun again
            retry_on_timeout=False,
            retry_on_status=_RETRIED,
            **certificates,
        )
    except (ValueError, OSError, ImproperlyConfigured) as error:
        raise DataError(
            f"opensearch.url: found {config.url!r} ({error}), expected http://host:port"
        ) from error
