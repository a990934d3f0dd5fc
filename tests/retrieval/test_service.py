"""The service as users start it: a real process, asked over real sockets."""

import asyncio
import contextlib
import json
import random
import resource
import socket

import httpx
import pytest

from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.service.search_queue import QueueFullError, SearchQueue
from megatron_sd.retrieval.service.server import build_app
from megatron_sd.retrieval.service.state import RetrievalService
from megatron_sd.retrieval.service.wire import render_reply
from tests.retrieval.fakes import START_S, WORDS, serving, small_corpus

LIMITS = (
    "--max_queries=300",
    "--max_query_bytes=100",
    "--max_body_mib=1",
    "--max_top_k=20",
    "--max_queued_queries=300",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("service") / "corpus")


@pytest.fixture(scope="module")
def offline(corpus):
    return CorpusRetriever(corpus, SearchConfig())


@pytest.fixture(scope="module")
def address(corpus, tmp_path_factory):
    with serving(corpus, tmp_path_factory.mktemp("served"), *LIMITS) as (address, _process):
        yield address


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=START_S, trust_env=False) as http:
        yield http


@pytest.mark.parametrize("return_scores", [True, False])
@pytest.mark.parametrize(
    "queries", [["kalo guides"], ["kalo guides", "sul 17"], ["kalo", "nothing of this", "dava quoted"] * 9]
)
def test_replies_are_byte_for_byte_those_of_an_offline_search(http, offline, queries, return_scores):
    reply = http.post("/retrieve", json={"queries": queries, "topk": 4, "return_scores": return_scores})
    assert reply.status_code == 200
    assert reply.content == render_reply(offline.find(queries, 4), return_scores=return_scores)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-corpus-version"] == offline.corpus_version


def test_the_singular_form_and_the_defaults_of_search_r1(http, offline):
    reply = http.post("/retrieve", json={"query": "kalo guides"})
    assert reply.content == render_reply(offline.find(["kalo guides"], 3), return_scores=False)
    (documents,) = reply.json()["result"]
    assert list(documents[0]) == ["id", "contents"]


def test_state_of_the_service(http, offline):
    assert http.get("/healthz").json() == {"alive": True}
    assert http.get("/readyz").json() == {"ready": True, "stage": "ready: 64 passages by bm25"}
    info = http.get("/info").json()
    assert (info["corpus_version"], info["num_passages"], info["method"]) == (
        offline.corpus_version,
        64,
        "bm25",
    )
    assert (info["max_queries"], info["max_top_k"], info["licenses"]) == (300, 20, ["CC0-1.0"])
    before = _counts(http)
    http.post("/retrieve", json={"queries": ["a", "b"]})
    http.post("/retrieve", content=b"{")
    after = _counts(http)
    assert after['requests_total{status="200"}'] - before.get('requests_total{status="200"}', 0) == 1
    assert after['requests_total{status="400"}'] - before.get('requests_total{status="400"}', 0) == 1
    assert after["queries_total"] - before["queries_total"] == 2
    assert after['request_seconds_bucket{le="+Inf"}'] == after["request_seconds_count"]
    assert after["queued_queries"] == 0


def _counts(http):
    lines = [
        line.removeprefix("sd_search_retriever_").rsplit(" ", 1)
        for line in http.get("/metrics").text.splitlines()
    ]
    return {name: float(value) for name, value in lines if not name.startswith("#")}


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ({"queries": ["a"] * 301}, 413, "queries: found 301, expected at most 300"),
        ({"queries": [5]}, 422, "queries[0]: found 5"),
        (
            {"queries": ["a"], "topk": -1},
            422,
            "topk: found -1, expected a whole number; 0 stands for 3, more than 20 for 20",
        ),
        (b'{"queries": ["' + b"a" * (1 << 20) + b'"]}', 413, "longer than 1048576 bytes"),
        (b'{"queries": ["\xff\xfe"]}', 400, "no JSON"),
        (b'{"queries":' + b"[" * 10_000, 400, "no JSON"),
        (b"", 400, "no JSON"),
    ],
)
def test_what_is_over_a_limit_gets_a_4xx_and_the_service_lives(http, content, status, message):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    reply = http.post("/retrieve", content=body)
    assert (reply.status_code, message in reply.json()["error"]) == (status, True), reply.text
    assert http.get("/readyz").status_code == 200


def test_search_r1s_loop_gets_a_result_for_every_turn(http, offline):
    """It posts once a turn for the whole batch and reads ["result"] without a look at the status."""
    long = "kalo " * 100  # this server cuts at 100 bytes
    before = _counts(http)
    turns = [[], ["", "kalo"], [" ", "\ud800 kalo"], [long, "dava"], ["kalo"] * 300]
    posted = [json.dumps({"queries": turn, "topk": 3, "return_scores": True}).encode() for turn in turns]
    found = [http.post("/retrieve", content=body).json()["result"] for body in posted]
    assert [len(results) for results in found] == [0, 2, 2, 2, 300]
    ids = [[[entry["document"]["id"] for entry in hits] for hits in results] for results in found]
    kalo, dava = ([hit.passage.id for hit in hits] for hits in offline.find(["kalo", "dava"], 3))
    assert ids[1] == [[], kalo] and ids[2] == [[], kalo] and ids[3] == [kalo, dava] and ids[4] == [kalo] * 300
    assert len(http.post("/retrieve", json={"queries": ["kalo"], "topk": 1000}).json()["result"][0]) <= 20
    after = _counts(http)
    assert after["queries_blank_total"] - before["queries_blank_total"] == 2
    assert after["queries_cut_total"] - before["queries_cut_total"] == 1


def test_a_body_without_a_declared_length_is_cut_off_too(http):
    reply = http.post("/retrieve", content=(b"a" * 65536 for _ in range(40)))
    assert reply.status_code == 413
    assert http.get("/retrieve").status_code == 405


def test_idle_sockets_do_not_stop_it(http, address):
    host, port = address.removeprefix("http://").split(":")
    num_sockets = min(1000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    with contextlib.ExitStack() as stack:
        for _ in range(num_sockets):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=START_S))
        assert http.post("/retrieve", json={"queries": ["kalo"]}).status_code == 200


def test_many_connections_get_their_own_answers(address, offline):
    """A shortened soak: 64 connections, 3,200 queries, every answer that of an offline search."""
    rng = random.Random(0)
    orders = [
        [f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randrange(64)}" for _ in range(5)] for _ in range(640)
    ]
    room = asyncio.Semaphore(40)  # times 5 queries: below the bound of the queue, whatever the timing

    async def ask(http, queries):
        async with room:
            reply = await http.post("/retrieve", json={"queries": queries, "topk": 3, "return_scores": True})
        return reply.status_code, reply.content

    async def ask_all():
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            base_url=address, limits=limits, timeout=START_S, trust_env=False
        ) as http:
            return await asyncio.gather(*(ask(http, queries) for queries in orders))

    for queries, (status, content) in zip(orders, asyncio.run(ask_all()), strict=True):
        assert status == 200
        assert content == render_reply(offline.find(queries, 3), return_scores=True)


def test_a_token_is_needed_beyond_loopback(corpus, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with serving(corpus, tmp_path, "--host=0.0.0.0", f"--token_file={tmp_path / 'token'}") as (
        address,
        process,
    ):
        url = address.replace("0.0.0.0", "127.0.0.1")
        for headers, status in [
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Bearer s3cret"}, 200),
        ]:
            for path in ("/info", "/metrics"):
                assert httpx.get(url + path, headers=headers, trust_env=False).status_code == status
            reply = httpx.post(
                url + "/retrieve", headers=headers, json={"queries": ["kalo"]}, trust_env=False
            )
            assert reply.status_code == status
        for token, status in [("wrong", 401), ("s3cret", 200)]:  # clients that know nothing but an address
            address_with_token = f"{url}/retrieve?token={token}"
            assert (
                httpx.post(address_with_token, json={"queries": ["kalo"]}, trust_env=False).status_code
                == status
            )
        process.terminate()
        assert process.wait(START_S) in (0, -15)


def test_settings_that_cannot_work_are_refused(corpus, capsys):
    from launch.cli import main

    serve = ["retriever", "serve", f"--corpus={corpus}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in [
            (["--host=0.0.0.0"], "set token_file"),
            (["--max_queued_queries=5"], "max_queued_queries: found 5, expected at least max_queries 16384"),
            (["--search.effort=-1"], "search.effort: found -1, expected 1 or more"),
            (["--token_file=nowhere"], "token_file: cannot read nowhere"),
            ([f"--port={port}"], f"cannot listen on 127.0.0.1:{port}"),
            (["--port=70000"], "cannot listen on 127.0.0.1:70000"),
        ]:
            assert main([*serve, *options]) in (1, 2)
            assert message in capsys.readouterr().err


def test_a_corpus_that_cannot_be_opened_ends_the_service(tmp_path, capsys):
    from launch.cli import main

    broken = small_corpus(tmp_path / "corpus")
    (broken / "bm25/rows.npy").write_bytes(b"")
    assert main(["retriever", "serve", f"--corpus={broken}", "--port=0"]) == 1
    assert "rows.npy has 0 bytes" in capsys.readouterr().err


def _service(open_corpus, **changes):
    from launch.retriever import ServeConfig, service_settings

    return RetrievalService(
        open_corpus, service_settings(ServeConfig(corpus="", **changes)), lambda line: None
    )


def test_while_it_loads_it_says_what_it_does(offline):
    async def check():
        may_open, loop = asyncio.Event(), asyncio.get_running_loop()

        def open_corpus(progress):
            progress("verifying file 1 of 5")
            asyncio.run_coroutine_threadsafe(may_open.wait(), loop).result()
            return offline

        service = _service(open_corpus)
        transport = httpx.ASGITransport(build_app(service, lambda: None))
        running = asyncio.create_task(service.run(lambda: None))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            while service.stage == "starting":
                await asyncio.sleep(0.001)
            assert (await http.get("/healthz")).status_code == 200
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["stage"]) == (503, "verifying file 1 of 5")
            for reply in (await http.get("/info"), await http.post("/retrieve", json={"queries": ["a"]})):
                assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
                assert "not ready yet: verifying" in reply.json()["error"]
            may_open.set()
            while (await http.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.001)
            assert (await http.post("/retrieve", json={"queries": ["kalo"]})).status_code == 200
        running.cancel()

    asyncio.run(check())


def test_a_failed_opening_is_kept_and_stops_the_server():
    stopped = []

    def open_corpus(progress):
        raise DataError("broken")

    service = _service(open_corpus)
    asyncio.run(service.run(lambda: stopped.append(True)))
    assert (str(service.failure), stopped) == ("broken", [True])
    with pytest.raises(ConfigError, match="which others can reach"):
        _service(open_corpus, host="::")


class SlowSearch:
    """Answers when it is told to; remembers what it was asked."""

    def __init__(self, loop):
        self.batches = []
        self._loop = loop
        self.go_on = asyncio.Event()

    def __call__(self, queries, top_k):
        self.batches.append((list(queries), top_k))
        asyncio.run_coroutine_threadsafe(self.go_on.wait(), self._loop).result()
        if "fail" in queries:
            raise ValueError("a search failed")
        return [(f"{query} {top_k}",) for query in queries]


def test_the_queue_batches_bounds_and_survives_a_failed_search():
    async def check():
        search = SlowSearch(asyncio.get_running_loop())
        queue = SearchQueue(search, max_queued=8, max_batch=3)
        running = asyncio.create_task(queue.run())
        first = asyncio.create_task(queue.submit(["a"], 2))
        while not search.batches:
            await asyncio.sleep(0.001)
        waiting = [
            asyncio.create_task(queue.submit(queries, k))
            for queries, k in [(["b", "c"], 2), (["b"], 2), (["d"], 5)]
        ]
        gone = asyncio.create_task(queue.submit(["x", "y"], 2))
        await asyncio.sleep(0)
        assert queue.num_queued == 7
        with pytest.raises(QueueFullError):
            await queue.submit(["e", "f"], 2)
        gone.cancel()
        await asyncio.sleep(0)
        search.go_on.set()
        assert await first == [("a 2",)]
        assert await asyncio.gather(*waiting) == [[("b 2",), ("c 2",)], [("b 2",)], [("d 5",)]]
        with pytest.raises(ValueError, match="a search failed"):
            await queue.submit(["fail"], 1)
        long = [f"q{n}" for n in range(7)]
        assert await queue.submit(long, 1) == [(f"{query} 1",) for query in long]
        assert search.batches[:3] == [(["a"], 2), (["b", "c"], 2), (["d"], 5)]
        assert [len(queries) for queries, _ in search.batches[4:]] == [3, 3, 1]
        assert queue.num_queued == 0
        running.cancel()

    asyncio.run(check())
