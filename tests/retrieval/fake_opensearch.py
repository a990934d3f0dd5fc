"""A fake of an OpenSearch server: the documented requests that the project makes, over real HTTP, in the
documented form.

It is no search engine: words are runs of letters and digits, vectors are looked at one by one. Errors have
OpenSearch's types, texts and statuses as its documentation gives them; no real server was at hand to
compare with.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status, and what becomes JSON; bytes go out as they are


@dataclass
class FakeIndex:
    """One index. A document is found after a refresh only."""

    body: dict[str, Any]
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    visible: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def properties(self) -> dict[str, Any]:
        return self.body["mappings"]["properties"]


class FakeOpenSearch:
    """`disturb(method, path)` may answer in its place. `requests`: (method, path) of all that came."""

    def __init__(self) -> None:
        self.indices: dict[str, FakeIndex] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str | None] = set()
        self.disturb: Callable[[str, str], Reply | None] = lambda method, path: None
        fake = self

        class Exchange(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: object) -> None:
                pass

            def do_POST(self) -> None:
                path = self.path.partition("?")[0]
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                fake.requests.append((self.command, path))
                fake.authorizations.add(self.headers.get("authorization"))
                status, answer = fake.disturb(self.command, path) or fake.answer(self.command, path, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json; charset=UTF-8")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self.do_POST()

            def do_PUT(self) -> None:
                self.do_POST()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def __enter__(self) -> FakeOpenSearch:
        return self

    def __exit__(self, *_details: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Reply:
        match [method, *path.strip("/").split("/")]:
            case ["POST", "_bulk"]:
                return self._bulk(body)
            case ["POST" | "GET", "_msearch"]:
                lines = [json.loads(line) for line in body.splitlines()]
                return 200, {
                    "took": 1,
                    "responses": [self._search(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)],
                }
            case ["PUT", name]:
                return self._create(name, json.loads(body))
            case [_, name, *_] if name not in self.indices:
                return missing(name)
            case ["GET", name, "_mapping"]:
                return 200, {name: {"mappings": self.indices[name].body["mappings"]}}
            case ["POST", name, "_refresh"]:
                self.indices[name].visible = dict(self.indices[name].written)
                return 200, {"_shards": SHARDS}
            case ["POST" | "GET", name, "_count"]:
                return 200, {"count": len(self.indices[name].visible), "_shards": SHARDS}
        return refused(
            400, "illegal_argument_exception", f"no handler found for uri [{path}] and method [{method}]"
        )

    def _create(self, name: str, body: dict[str, Any]) -> Reply:
        if name in self.indices:
            return refused(400, "resource_already_exists_exception", f"index [{name}/aa] already exists")
        if name != name.lower():
            return refused(
                400, "invalid_index_name_exception", f"Invalid index name [{name}], must be lowercase"
            )
        self.indices[name] = FakeIndex(body)
        return 200, {"acknowledged": True, "shards_acknowledged": True, "index": name}

    def _bulk(self, body: bytes) -> Reply:
        lines = [json.loads(line) for line in body.splitlines()]
        items = [
            self._write(action["index"], source)
            for action, source in zip(lines[::2], lines[1::2], strict=True)
        ]
        return 200, {
            "took": 1,
            "errors": any("error" in item for item in items),
            "items": [{"index": item} for item in items],
        }

    def _write(self, action: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        place = {"_index": action["_index"], "_id": action["_id"]}
        index = self.indices[action["_index"]]
        for name, value in source.items():
            error = _mapping_error(name, value, index.properties)
            if error is not None:
                return place | {"status": 400, "error": error}
        index.written[action["_id"]] = source
        return place | {"_version": 1, "result": "created", "_shards": SHARDS, "status": 201}

    def _search(self, header: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
        name = header["index"]
        if name not in self.indices:
            status, error = missing(name)
            return error
        query = order["query"]
        if "match" in query:
            ((_, match),) = query["match"].items()
            scores = self._bm25(self.indices[name], match["query"])
        else:
            ((field_name, knn),) = query["knn"].items()
            if field_name not in self.indices[name].properties:
                status, error = refused(400, "search_phase_execution_exception", "all shards failed")
                return error
            scores = self._nearest(self.indices[name], field_name, knn)
        documents = self.indices[name].visible
        found = sorted(scores, key=lambda id_: (-scores[id_], documents[id_].get("passage_id", "")))[
            : order["size"]
        ]
        hits = [
            {
                "_index": name,
                "_id": id_,
                "_score": scores[id_],
                "_source": {key: documents[id_][key] for key in order["_source"] if key in documents[id_]},
            }
            for id_ in found
        ]
        best = max((hit["_score"] for hit in hits), default=None)
        return {
            "took": 1,
            "timed_out": False,
            "_shards": SHARDS,
            "hits": {"max_score": best, "hits": hits},
            "status": 200,
        }

    def _bm25(self, index: FakeIndex, query: str) -> dict[str, float]:
        """Lucene's BM25 of the fields that are copied together."""
        similarity = index.body["settings"]["index"]["similarity"]["default"]
        k1, b = similarity["k1"], similarity["b"]
        counts = {
            id_: Counter(words(f"{own.get('title', '')} {own.get('text', '')}"))
            for id_, own in index.visible.items()
        }
        mean = sum(own.total() for own in counts.values()) / max(1, len(counts))
        scores: dict[str, float] = {}
        for word in words(query):
            having = [id_ for id_, own in counts.items() if own[word]]
            idf = math.log(1 + (len(counts) - len(having) + 0.5) / (len(having) + 0.5))
            for id_ in having:
                frequency = counts[id_][word]
                share = frequency / (frequency + k1 * (1 - b + b * counts[id_].total() / mean))
                scores[id_] = scores.get(id_, 0.0) + idf * share
        return scores

    def _nearest(self, index: FakeIndex, name: str, knn: dict[str, Any]) -> dict[str, float]:
        """Space innerproduct of the engine faiss: p + 1 for a product p above 0, else 1 / (1 - p)."""
        found = {}
        for id_, own in index.visible.items():
            product = sum(x * y for x, y in zip(own[name], knn["vector"], strict=True))
            found[id_] = product + 1 if product > 0 else 1 / (1 - product)
        return dict(sorted(found.items(), key=lambda item: -item[1])[: knn["k"]])


SHARDS = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}


def words(text: str) -> list[str]:
    """What the fake takes for words."""
    return re.findall(r"\w+", text.lower())


def refused(status: int, kind: str, reason: str, **more: str) -> Reply:
    """An error as OpenSearch writes it."""
    error = {"type": kind, "reason": reason} | more
    return status, {"error": {"root_cause": [error]} | error, "status": status}


def missing(name: str) -> Reply:
    """No such index."""
    return refused(404, "index_not_found_exception", f"no such index [{name}]", index=name)


def _mapping_error(name: str, value: Any, properties: dict[str, Any]) -> dict[str, Any] | None:
    if name not in properties:
        reason = f"mapping set to strict, dynamic introduction of [{name}] within [_doc] is not allowed"
        return {"type": "strict_dynamic_mapping_exception", "reason": reason}
    if properties[name]["type"] == "knn_vector" and len(value) != properties[name]["dimension"]:
        return {
            "type": "mapper_parsing_exception",
            "reason": f"failed to parse field [{name}] of type [knn_vector]",
        }
    return None
