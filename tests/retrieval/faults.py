"""The faults of corpora and retriever at full counts, a line each; the quick tier has them shortened.

    python -m tests.retrieval.faults [--only R10,R11,R16] [--corpus DIR --queries FILE.jsonl.zst]

R10 a server killed in the middle of a burst and started again, 20 times. R11 20 steps of 10,240 queries
over 64 connections, every reply compared with an offline search. R16 import, chunk, encode and index, each
killed 50 times at random moments. Without --corpus R11 serves 2,000 small passages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from data_prep.passages.index import IndexConfig
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, write_table
from data_prep.sources.jsonl import read_lines
from data_prep.vectors.encode import EncodeConfig
from megatron_sd.config import SearchConfig
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.remote.client import HttpRetriever
from megatron_sd.retrieval.service.wire import render_reply
from tests.data_prep.killed_stages import Start, contents, launch, run, small_pieces
from tests.retrieval.fakes import START_S, WORDS, quick_client, serving, small_corpus
from tests.retrieval.fakes_encoder import tiny_encoder

NUM_BURSTS, BURST = 20, 400
NUM_STEPS, STEP_QUERIES, QUERIES_A_REQUEST, NUM_CONNECTIONS, TOP_K = 20, 10_240, 8, 64, 3
NUM_KILLS = 50


def killed_servers(folder: Path) -> str:
    """R10."""
    corpus = small_corpus(folder / "corpus")
    offline = CorpusRetriever(corpus, SearchConfig())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    wrong, waits = 0, []

    async def story() -> None:
        nonlocal wrong
        with serving(corpus, folder, f"--port={port}") as (address, process):
            client = quick_client(deadline_s=120.0, max_request_queries=2, max_connections=2, cache_size=1)
            retriever = HttpRetriever([address], client)
            asked = await burst(retriever, process, 0)
        for number in range(1, NUM_BURSTS + 1):
            killed = time.monotonic()
            with serving(corpus, folder, f"--port={port}", wait=False) as (_, process):
                found = [hits for task in asked for hits in await task]
                waits.append(time.monotonic() - killed)
                wrong += sum(
                    own != right
                    for own, right in zip(found, offline.find(queries(number - 1), TOP_K), strict=True)
                )
                if number < NUM_BURSTS:
                    asked = await burst(retriever, process, number)
        retriever.close()

    def queries(number: int) -> list[str]:
        return [f"{WORDS[number % 8]} {n % 64} in {1900 + n}" for n in range(BURST)]

    async def burst(retriever: HttpRetriever, process: Any, number: int) -> list[Any]:
        asked = [asyncio.create_task(retriever.search([query], TOP_K)) for query in queries(number)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        process.kill()
        return asked

    asyncio.run(story())
    last = (
        f"the last answer came {statistics.median(waits):.1f} s (median), at most {max(waits):.1f} s, after"
        " the kill"
    )
    return (
        f"R10: {NUM_BURSTS} kills, {NUM_BURSTS * BURST} searches, {wrong} without their own answer; {last},"
        " start included"
    )


def soak(folder: Path, corpus: Path | None, questions: Path | None) -> str:
    """R11."""
    rng = random.Random(0)
    if corpus is None or questions is None:
        corpus = small_corpus(folder / "soaked", 2000)
        texts = [
            f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randrange(2000)}" for _ in range(STEP_QUERIES)
        ]
    else:
        rows = [json.loads(line) for _, line in read_lines(questions)]
        texts = [row.get("question") or row["text"] for row in rows]
    offline = CorpusRetriever(corpus, SearchConfig())
    seconds: list[list[float]] = []
    memory, wrong = [], 0

    async def step(address: str, orders: list[list[str]]) -> list[bytes]:
        room, own = asyncio.Semaphore(NUM_CONNECTIONS), []

        async def ask(http: httpx.AsyncClient, order: list[str]) -> bytes:
            async with room:
                began = time.perf_counter()
                reply = await http.post(
                    "/retrieve", json={"queries": order, "topk": TOP_K, "return_scores": True}
                )
                own.append(time.perf_counter() - began)
            return reply.content if reply.status_code == 200 else b""

        limits = httpx.Limits(max_connections=NUM_CONNECTIONS, max_keepalive_connections=NUM_CONNECTIONS)
        async with httpx.AsyncClient(
            base_url=address, limits=limits, timeout=START_S, trust_env=False
        ) as http:
            replies = await asyncio.gather(*(ask(http, order) for order in orders))
        seconds.append(own)
        return replies

    with serving(corpus, folder) as (address, process):
        for _ in range(NUM_STEPS):
            drawn = rng.choices(texts, k=STEP_QUERIES)
            orders = [
                drawn[start : start + QUERIES_A_REQUEST]
                for start in range(0, STEP_QUERIES, QUERIES_A_REQUEST)
            ]
            replies = asyncio.run(step(address, orders))
            memory.append(_resident_mib(process.pid))
            expected = (render_reply(offline.find(order, TOP_K), return_scores=True) for order in orders)
            wrong += sum(reply != right for reply, right in zip(replies, expected, strict=True))
    every = sorted(s for own in seconds for s in own)
    p50, p99 = every[len(every) // 2], every[len(every) * 99 // 100]
    by_step = sorted(sorted(own)[len(own) * 99 // 100] / sorted(own)[len(own) // 2] for own in seconds)
    growth = 100 * (memory[-1] / memory[0] - 1)
    resident = ", ".join(f"{own:.0f}" for own in memory)
    return (
        f"R11: {NUM_STEPS} steps of {STEP_QUERIES} queries, {QUERIES_A_REQUEST} a request, {NUM_CONNECTIONS}"
        f" connections, {len(offline.passages)} passages: {wrong} of {len(every)} replies other than offline;"
        f" p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms ({p99 / p50:.1f} x; by step {by_step[0]:.1f} to"
        f" {by_step[-1]:.1f}); resident MiB after each step {resident} ({growth:+.1f} % from the first to the"
        " last)"
    )


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def killed_stages(folder: Path) -> Iterator[str]:
    """R16: each stage from the same input, whole and killed."""
    from data_prep.passages.chunk import ChunkConfig
    from data_prep.sources.questions import ImportConfig

    rows = [
        {"id": f"{n}", "title": f"t{n}", "text": f"kalo é{n} dava sul " * (n % 9 + 1)} for n in range(600)
    ]
    random.Random(0).shuffle(rows)
    (folder / "wiki.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    passages = [SourcedPassage(**row) for row in rows]
    with small_pieces():
        write_table(folder / "passages", passages, Origin())
    tiny_encoder(folder / "encoder")
    paths = {"passages": f"{folder}/passages"}
    encoding = {"encoder": f"{folder}/encoder", "rows_per_shard": 25, "batch_size": 8, "devices": ("cpu",)}
    configs: dict[str, Any] = {
        "import": lambda output: ImportConfig(
            kind="passages", input=f"{folder}/wiki.jsonl", output=output, rows_per_run=64
        ),
        "chunk": lambda output: ChunkConfig(**paths, output=output, size=10, rows_per_run=64),
        "encode": lambda output: EncodeConfig(**paths, output=output, **encoding),
        "index": lambda output: IndexConfig(**paths, output=output),
    }
    yield from (_killed_stage(folder / stage, stage, make) for stage, make in configs.items())


def _killed_stage(folder: Path, stage: str, make: Any) -> str:
    folder.mkdir()
    log = folder / "log"
    for name in ("warm", "whole"):  # the first process waits for the imports
        began = time.monotonic()
        whole = run(Start(stage=stage, config=make(f"{folder}/{name}"), log=log))
        whole_s = time.monotonic() - began
        assert whole[0] == 0
    expected = contents(folder / "whole")
    rng, output, done = random.Random(2), folder / "killed", []
    kills = finished = same = rework = 0
    start = Start(stage=stage, config=make(str(output)), log=log)
    while kills < NUM_KILLS or not output.exists():
        log.write_bytes(b"")
        process = launch(start)
        process.join(rng.random() * whole_s if kills < NUM_KILLS else None)
        process.kill()
        process.join()
        kills += process.exitcode == -9
        done.append(len(log.read_bytes().partition(b"\n")[0]))
        if output.exists():
            finished += 1
            same += contents(output) == expected
            rework += sum(done) - whole[1]
            done = []
            if kills < NUM_KILLS:
                shutil.rmtree(output)
    unit = {"import": "rows read", "chunk": "passages cut", "encode": "shards written", "index": "rows read"}[
        stage
    ]
    again = (
        ""
        if stage == "index"
        else f"; {rework} {unit} again, {rework / kills:.1f} a kill, of {whole[1]} in a whole run"
    )
    return (
        f"R16 {stage}: {kills} kills, {same} of {finished} finished outputs with the bytes of the undisturbed"
        f" one{again}"
    )


def main() -> None:
    """Run what is asked for, and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m tests.retrieval.faults", allow_abbrev=False)
    parser.add_argument("--only", default="R10,R11,R16")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--queries", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        folder = Path(name)
        runs = {
            "R16": lambda: killed_stages(folder),
            "R10": lambda: [killed_servers(folder)],
            "R11": lambda: [soak(folder, options.corpus, options.queries)],
        }
        for test, own in runs.items():
            if test in options.only.split(","):
                began = time.monotonic()
                for line in own():
                    print(line, flush=True)
                print(f"{test} took {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
