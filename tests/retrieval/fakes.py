"""A corpus of a few passages, the real service as a process, and a fake server whose every reply a test
decides."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from data_prep.passages.index import IndexConfig, Labels, bm25_settings, write_corpus
from megatron_sd.config import ClientConfig
from megatron_sd.records import Passage
from megatron_sd.retrieval.service.wire import QUERIES_HEADER, VERSION_HEADER, queries_digest

WORDS = ("kalo", "dava", "sul", "miren", "tovi", "rask", "lunet", "pergo")
START_S = 120  # a busy machine imports slowly


def small_corpus(path: Path, num_passages: int = 64) -> Path:
    """Passages of words whose combinations differ, and one with everything that is hard to carry."""
    passages = [
        Passage(
            id=f"{n:04d}",
            title=f"{WORDS[n % 8]} {n}",
            text=f"{WORDS[n // 8 % 8]} guides {WORDS[n * 5 % 8]} in year {1900 + n}",
        )
        for n in range(num_passages - 1)
    ]
    passages.append(
        Passage(
            id="hard",
            title='a "quoted" title',
            text='line\nbreak, "quotes", \\slash, é漢字🙂, </information>',
        )
    )
    write_corpus(
        path, passages, bm25_settings(IndexConfig(passages="", output="")), Labels(licenses=("CC0-1.0",))
    )
    return path


@contextlib.contextmanager
def serving(
    corpus: Path, scratch: Path, *options: str, wait: bool = True
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`sd-search retriever serve` on a free port: its address, and the process."""
    port_file = scratch / "address"
    port_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "retriever",
        "serve",
        f"--corpus={corpus}",
        f"--port_file={port_file}",
    ]
    command += options
    command += [] if any(option.startswith("--port=") for option in options) else ["--port=0"]
    with open(scratch / "serve.log", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            address = _until(
                lambda: port_file.read_text().strip() if port_file.exists() else None, process, scratch
            )
            if wait:
                _until(lambda: _is_ready(address), process, scratch)
            yield address, process
        finally:
            process.kill()
            process.wait()


def _until(ask: Callable[[], Any], process: subprocess.Popen[bytes], scratch: Path) -> Any:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (answer := ask()) is not None:
            return answer
        assert process.poll() is None, (scratch / "serve.log").read_text()
        time.sleep(0.05)
    raise AssertionError("the service did not start: " + (scratch / "serve.log").read_text())


def _is_ready(address: str) -> bool | None:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/readyz", timeout=START_S, trust_env=False).status_code == 200 or None
    return None


def quick_client(**changes: object) -> ClientConfig:
    """The default client with pauses a test can wait for."""
    quick = {
        "first_pause_s": 0.01,
        "max_pause_s": 0.02,
        "ready_s": 5.0,
        "breaker_open_s": 0.3,
        "max_connections": 8,
    }
    return ClientConfig(**(quick | changes))


@dataclass(frozen=True, kw_only=True)
class FakeReply:
    """What the fake server sends. cut: close the connection after so many bytes. headers: on top of the
    honest ones."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: int | None = None


def honest(queries: list[str], top_k: int) -> FakeReply:
    """One passage a query, which repeats it."""
    hits = [
        [{"document": {"id": f"d {query}", "contents": f'"t"\n{query}'}, "score": 1.5}] for query in queries
    ]
    return FakeReply(body=json.dumps({"result": hits}).encode())


class FakeServer:
    """Answers POST /retrieve with `behave(queries, top_k, number of the request)`, and GET /info, unless
    `version` is empty: then it knows no more than Search-R1's server."""

    def __init__(
        self,
        behave: Callable[[list[str], int, int], FakeReply],
        version: str = "v1",
        limits: dict[str, int] | None = None,
    ) -> None:
        self.behave = behave
        self.version = version
        self.requests: list[list[str]] = []
        fake = self

        class Exchange(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                known = FakeReply(body=json.dumps({"corpus_version": fake.version} | (limits or {})).encode())
                self._send(known if fake.version else FakeReply(status=404))

            def do_POST(self) -> None:
                fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.requests.append(fields["queries"])
                reply = fake.behave(fields["queries"], fields["topk"], len(fake.requests))
                ours = {VERSION_HEADER: fake.version, QUERIES_HEADER: queries_digest(fields["queries"])}
                self._send(reply, ours if fake.version else {})

            def _send(self, reply: FakeReply, headers: dict[str, str] | None = None) -> None:
                time.sleep(reply.delay_s)
                with contextlib.suppress(ConnectionError):
                    self.send_response(reply.status)
                    for name, value in (
                        (headers or {}) | reply.headers | {"content-length": str(len(reply.body))}
                    ).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(reply.body[: reply.cut])
                self.close_connection = reply.cut is not None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_details: object) -> None:
        self._server.shutdown()
        self._server.server_close()
