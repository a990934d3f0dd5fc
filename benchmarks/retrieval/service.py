"""The retrieval service against one of Search-R1's make, on the same BM25 index, in turn, asked over 64
connections.

    python -m benchmarks.retrieval.service [--json FILE] [--corpus DIR] [--queries FILE.jsonl]

The other server searches as Search-R1's does: a synchronous endpoint in a pool of threads, one blocking
search a query, documents row by row from a `datasets` table. Both run in processes of their own, with
uvicorn and the same loop. Without --corpus the passages are synthetic (60,000 of 80 words). Milliseconds a
query, wall clock and processor time of the server; p50 and p99 of a request are printed beside them. A
burst is 2,560 queries at once: forty requests of 64.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.baseline import Comparison, report

NUM_CONNECTIONS, NUM_ROUNDS, TOP_K = 64, 3, 3
SIZES = {1: 1_500, 8: 300}  # queries of a request -> requests a round
BURST = 2_560


class Order(BaseModel):
    """Search-R1's request."""

    queries: list[str]
    topk: int | None = None
    return_scores: bool = False


def peer(corpus: Path, port: int) -> None:
    """A server of Search-R1's make over a corpus directory."""
    import bm25s
    from datasets import Dataset

    from megatron_sd.retrieval.corpus.bm25 import Bm25Index
    from megatron_sd.retrieval.corpus.manifest import read_manifest

    manifest, _ = read_manifest(corpus, "corpus")
    index = Bm25Index(corpus, manifest.settings["bm25"], manifest.num_passages)
    scores, rows, starts = index.index
    theirs = bm25s.BM25(method="lucene", backend="numba")
    theirs.scores = {"data": scores, "indices": rows, "indptr": starts, "num_docs": manifest.num_passages}
    theirs.nonoccurrence_array, theirs.vocab_dict = None, {}
    theirs.unique_token_ids_set = set(range(len(starts) - 1))
    passages = Dataset.from_file(str(corpus / "passages.arrow"))

    def search(query: str, top_k: int) -> tuple[list[dict], list[float]]:
        found = theirs.retrieve([index.term_ids(query)], k=top_k, show_progress=False, n_threads=1)
        taken = [passages[int(row)] for row in found.documents[0]]
        documents = [{"id": row["id"], "contents": f'"{row["title"]}"\n{row["text"]}'} for row in taken]
        return documents, found.scores[0].tolist()

    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(order: Order):
        found = [search(query, order.topk or TOP_K) for query in order.queries]
        pairs = [
            [{"document": d, "score": s} for d, s in zip(documents, scores)] for documents, scores in found
        ]
        return {"result": pairs if order.return_scores else [documents for documents, _ in found]}

    @app.get("/readyz")
    def readyz():
        return {"ready": True}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server process and its port."""

    port: int
    process: subprocess.Popen[bytes]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a load took: seconds in all, and of each request."""

    wall_s: float
    request_s: Sequence[float]


async def _request(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], head: bytes, body: bytes
) -> tuple[int, bytes]:
    """One HTTP/1.1 exchange on a kept connection, with as little work as can be."""
    reader, writer = streams
    writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def ask(port: int, requests: Sequence[bytes], num_connections: int) -> Load:
    """All requests over so many connections, each of which sends its next one when it has its answer."""
    waiting, request_s = list(reversed(requests)), []
    head = b"POST /retrieve HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"

    async def connection(streams) -> None:
        while waiting:
            body, started = waiting.pop(), time.perf_counter()
            status, _ = await _request(streams, head, body)
            request_s.append(time.perf_counter() - started)
            assert status == 200, status

    opened = [await asyncio.open_connection("127.0.0.1", port, limit=1 << 26) for _ in range(num_connections)]
    started = time.perf_counter()
    await asyncio.gather(*(connection(streams) for streams in opened))
    wall_s = time.perf_counter() - started
    for _, writer in opened:
        writer.close()
    return Load(wall_s=wall_s, request_s=request_s)


def orders(queries: Sequence[str], size: int, num_requests: int, rng: random.Random) -> list[bytes]:
    """Request bodies of `size` queries."""
    fields = {"topk": TOP_K, "return_scores": True}
    return [json.dumps({"queries": rng.sample(queries, size)} | fields).encode() for _ in range(num_requests)]


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments: Sequence[str], port: int) -> subprocess.Popen[bytes]:
    """A server process, once it answers."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            asyncio.run(_probe(port))
            return process
        except (OSError, AssertionError, asyncio.IncompleteReadError):
            time.sleep(0.2)
    raise SystemExit(f"the server {arguments} did not start")


async def _probe(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
    line = await reader.readuntil(b"\r\n")
    writer.close()
    assert b" 200 " in line


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def rss_mib(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(
    servers: Sequence[Server], queries: Sequence[str], size: int, num_requests: int
) -> list[Comparison]:
    """Both servers in turn, round by round, on the same requests; medians."""
    rng = random.Random(size)
    loads: tuple[list[Load], list[Load]] = ([], [])
    processor_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_ROUNDS):
        requests = orders(queries, size, num_requests, rng)
        for server, own, spent in zip(servers, loads, processor_s, strict=True):
            before = cpu_s(server.process)
            own.append(asyncio.run(ask(server.port, requests, NUM_CONNECTIONS)))
            spent.append(cpu_s(server.process) - before)
    for name, own in zip(("ours", "peer"), loads, strict=True):
        request_ms = [1000 * seconds for load in own for seconds in load.request_s]
        figures = ", ".join(
            f"p{share * 100:.0f} {percentile(request_ms, share):.1f} ms" for share in (0.5, 0.99)
        )
        qps = size * num_requests / statistics.median(load.wall_s for load in own)
        print(f"  {name}: {size} queries a request, {qps:,.0f} queries/s, {figures} a request", flush=True)
    wall = [[load.wall_s for load in own] for own in loads]
    name = f"/retrieve, {size} queries a request"
    return [
        _comparison(
            f"{name}, {what}", [statistics.median(own) / (size * num_requests) * 1000 for own in values]
        )
        for what, values in (("wall", wall), ("processor", processor_s))
    ]


def _comparison(name: str, values: Sequence[float]) -> Comparison:
    ours, theirs = values
    return Comparison(name=name, ours=ours, theirs=theirs, unit="ms", against="Search-R1's way")


def measure(corpus: Path, queries: Sequence[str]) -> list[Comparison]:
    """Start both servers, measure, stop them."""
    ports = (free_port(), free_port())
    serve = ["-m", "launch.cli", "retriever", "serve", f"--corpus={corpus}", f"--port={ports[0]}"]
    servers: list[Server] = []
    try:
        servers.append(Server(port=ports[0], process=start(serve, ports[0])))
        peer_arguments = ["-m", __spec__.name, "--peer", str(ports[1]), "--corpus", str(corpus)]
        servers.append(Server(port=ports[1], process=start(peer_arguments, ports[1])))
        pairs = [compare(servers, queries, size, num_requests) for size, num_requests in SIZES.items()]
        before = rss_mib(servers[0].process)
        rng = random.Random(0)
        bursts = [
            asyncio.run(ask(ports[0], orders(queries, 64, BURST // 64, rng), BURST // 64)) for _ in range(5)
        ]
        burst_s = statistics.median(load.wall_s for load in bursts)
        after = rss_mib(servers[0].process)
        print(
            f"  ours: bursts of {BURST} queries, {burst_s:.2f} s each, no error; RSS {before:.0f} ->"
            f" {after:.0f} MiB"
        )
        return [comparison for pair in pairs for comparison in pair]
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()


def synthetic(directory: Path) -> tuple[Path, list[str]]:
    """The corpus of bm25.py, and queries of its words."""
    import numpy as np

    from benchmarks.retrieval.bm25 import build, zipf_passages

    rng = np.random.default_rng(0)
    words = zipf_passages(rng)
    build(words, directory)
    return directory / "corpus", [
        " ".join(f"w{word}" for word in row[:8]) for row in words[rng.integers(len(words), size=4_000)]
    ]


def main() -> None:
    """Measure and report, or be the other server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--peer", type=int)
    arguments = parser.parse_args()
    if arguments.peer is not None:
        peer(arguments.corpus, arguments.peer)
        return
    with tempfile.TemporaryDirectory() as directory:
        if arguments.corpus is None:
            corpus, queries = synthetic(Path(directory))
        else:
            corpus = arguments.corpus
            queries = [json.loads(line)["text"] for line in arguments.queries.read_text().splitlines()]
        report("retrieval", measure(corpus, queries), arguments.json)


if __name__ == "__main__":
    main()
