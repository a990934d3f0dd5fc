"""Search-R1's `/retrieve` exchange, read and written on both sides, byte for byte.

    POST {"queries": ["...", ...], "topk": 3, "return_scores": true}
    200  {"result":[[{"document":{"id":"7","contents":"\\"Title\\"\\ntext"},"score":12.5}, ...], ...]}
    200  {"result":[[{"id":"7","contents":"\\"Title\\"\\ntext"}, ...], ...]}                               return_scores false

The singular form {"query": "..."} of other clients gets a result of one list. Every implementation of this
exchange is lenient, and the training loops around it read `["result"]` without looking at the status. So is
this one, query by query: a blank query gets an empty list, a long one is cut, `[]` gets `{"result":[]}`;
`topk` 0 or missing is the default, one above the passages is all of them. What is no such request at all is
refused. A strict server refuses all of these (RequestLimits.is_strict).

Two headers say what the body cannot: which corpus answered, and which queries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from megatron_sd.errors import RetrievalError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.corpus.passages import join_contents, split_contents

VERSION_HEADER = "x-corpus-version"
# so that an answer to other queries, or to these in another order, is noticed
QUERIES_HEADER = "x-queries-xxh3"


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for. max_top_k: the smaller of the server's limit and the passages of the
    corpus. is_strict: refuse what would be cut or left unanswered."""

    max_queries: int
    max_query_bytes: int
    max_top_k: int
    default_top_k: int
    is_strict: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchOrder:
    """A request that was understood; its queries as they were sent."""

    queries: tuple[str, ...]
    top_k: int
    return_scores: bool


class RequestError(Exception):
    """A request that is refused: HTTP `status` and what was found, expected and to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def render_order(order: SearchOrder) -> bytes:
    """A request body."""
    return _dump({"queries": order.queries, "topk": order.top_k, "return_scores": order.return_scores})


def parse_order(body: bytes, limits: RequestLimits) -> SearchOrder:
    """A request body. Raises RequestError that names the field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            400, f"the body is no JSON ({error}); expected an object with 'queries'"
        ) from error
    if not isinstance(fields, dict):
        raise RequestError(422, f"found a JSON {type(fields).__name__}, expected an object with 'queries'")
    return SearchOrder(
        queries=_queries(fields, limits),
        top_k=_top_k(fields, limits),
        return_scores=_return_scores(fields, limits),
    )


def _queries(fields: dict[str, Any], limits: RequestLimits) -> tuple[str, ...]:
    queries = fields.get("queries", fields.get("query"))
    if isinstance(queries, str) and not (limits.is_strict and "queries" in fields):
        queries = [queries]
    if not isinstance(queries, list) or (limits.is_strict and not queries):
        raise RequestError(
            422, f"queries: found {queries!r:.80}, expected a list of strings (or 'query', one string)"
        )
    if len(queries) > limits.max_queries:
        raise RequestError(
            413,
            f"queries: found {len(queries)}, expected at most {limits.max_queries}; send several requests",
        )
    for place, query in enumerate(queries):
        if not isinstance(query, str):
            raise RequestError(422, f"queries[{place}]: found {query!r:.80}, expected a string")
        if limits.is_strict:
            _check_query(query, place, limits)
    return tuple(queries)


def _check_query(query: str, place: int, limits: RequestLimits) -> None:
    """What a strict server asks of a query."""
    if not query.strip():
        raise RequestError(422, f"queries[{place}]: found {query!r:.80}, expected a non-empty string")
    num_bytes = len(query.encode(errors="surrogatepass"))
    if num_bytes > limits.max_query_bytes:
        raise RequestError(
            413, f"queries[{place}]: found {num_bytes} bytes, expected at most {limits.max_query_bytes}"
        )
    if not query.isprintable() and any("\ud800" <= character <= "\udfff" for character in query):
        raise RequestError(422, f"queries[{place}]: found half a character (a lone surrogate), expected text")


def _top_k(fields: dict[str, Any], limits: RequestLimits) -> int:
    """`topk`, or `top_k` as some clients call it."""
    default = min(limits.default_top_k, limits.max_top_k)
    found = fields.get("topk", fields.get("top_k"))
    if found is None:
        return default
    top_k = int(found) if not limits.is_strict and isinstance(found, str) and found.isdecimal() else found
    highest = limits.max_top_k if limits.is_strict else math.inf
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not limits.is_strict <= top_k <= highest:
        lenient = (
            f"a whole number; 0 stands for {default}, more than {limits.max_top_k} for {limits.max_top_k}"
        )
        expected = f"a whole number from 1 to {limits.max_top_k}" if limits.is_strict else lenient
        raise RequestError(422, f"topk: found {found!r:.80}, expected {expected}")
    return min(top_k, limits.max_top_k) or default


def _return_scores(fields: dict[str, Any], limits: RequestLimits) -> bool:
    found = fields.get("return_scores", False)
    if isinstance(found, bool):
        return found
    if limits.is_strict or found not in (None, 0, 1):
        raise RequestError(422, f"return_scores: found {found!r:.80}, expected true or false")
    return bool(found)


def render_reply(found: Sequence[Sequence[Hit]], *, return_scores: bool) -> bytes:
    """A reply body."""
    documents = [
        [{"id": hit.passage.id, "contents": join_contents(hit.passage)} for hit in hits] for hits in found
    ]
    if not return_scores:
        return _dump({"result": documents})
    pairs = zip(documents, found, strict=True)
    scored = [
        [{"document": doc, "score": hit.score} for doc, hit in zip(own, hits, strict=True)]
        for own, hits in pairs
    ]
    return _dump({"result": scored})


def parse_reply(body: bytes, *, num_queries: int, top_k: int) -> list[tuple[Hit, ...]]:
    """The hits of a reply with scores. Raises RetrievalError when it is cut, of another form, or no
    possible answer."""
    try:
        result = json.loads(body)["result"]
        found = [tuple(_hit(entry, rank) for rank, entry in enumerate(hits, start=1)) for hits in result]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RetrievalError(
            f"the retriever's reply ({len(body)} bytes) is not of Search-R1's form: {type(error).__name__}:"
            f" {error}; it begins {body[:80]!r}"
        ) from error
    if len(found) != num_queries:
        raise RetrievalError(f"the retriever answered {len(found)} queries, expected {num_queries}")
    for hits in found:
        ids = [hit.passage.id for hit in hits]
        if len(ids) > top_k or len(set(ids)) < len(ids):
            raise RetrievalError(
                f"the retriever returned passages {ids}, expected at most {top_k} different ones"
            )
    return found


def _hit(entry: dict[str, Any], rank: int) -> Hit:
    """One entry of a reply, with what other servers leave out: no id (Search-R1's BM25 server with stored
    documents, its web servers) becomes one of the contents, no score that of the place."""
    document, score = entry.get("document", entry), entry.get("score", 1.0 / rank)
    contents = document["contents"]
    id_ = document.get("id", f"contents:{xxhash.xxh3_64_hexdigest(contents.encode(errors='surrogatepass'))}")
    if id_ in (-1, "-1", "") or not isinstance(id_, str | int):
        raise ValueError(f"a document has the id {id_!r}")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"document {id_!r} has the score {score!r}")
    title, text = split_contents(contents)
    return Hit(passage=Passage(id=str(id_), title=title, text=text), score=float(score))


def queries_digest(queries: Sequence[str]) -> str:
    """Hexadecimal XXH3-64 of the queries in order."""
    return xxhash.xxh3_64_hexdigest(_dump(queries))


def _dump(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="surrogatepass")
