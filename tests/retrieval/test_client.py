"""The client against every way a server can fail, and against the real one killed in the middle of a
burst."""

import asyncio
import contextlib
import json
import socket

import pytest

from megatron_sd.config import RetrieverConfig, SearchConfig
from megatron_sd.errors import ConfigError, DataError, RetrievalError, RolloutError
from megatron_sd.records import StopReason
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.remote.client import HttpRetriever
from megatron_sd.retrieval.remote.endpoints import BreakerSettings, Endpoint, choose
from megatron_sd.rollout.rollouter import Rollouter
from tests.builders import question
from tests.retrieval.fakes import FakeReply, FakeServer, honest, quick_client, serving, small_corpus
from tests.rollout.fakes import ScriptedEngine, environment


@contextlib.contextmanager
def client_of(*servers, **changes):
    retriever = HttpRetriever([server.url for server in servers], quick_client(**changes))
    try:
        yield retriever
    finally:
        retriever.close()


def search(retriever, *queries, top_k=2):
    return [[hit.passage.text for hit in hits] for hits in asyncio.run(retriever.search(queries, top_k))]


def first_then_honest(*replies):
    """The first requests get these replies, later ones honest ones."""
    return lambda queries, top_k, number: (
        replies[number - 1] if number <= len(replies) else honest(queries, top_k)
    )


BROKEN = {
    "500": FakeReply(status=500, body=b"Traceback"),
    "503": FakeReply(status=503),
    "429": FakeReply(status=429),
    "no JSON": FakeReply(body=b"<html>"),
    "another schema": FakeReply(body=b'{"hits": []}'),
    "truncated": FakeReply(body=json.dumps({"result": [[]]}).encode(), cut=5),
    "hung up": FakeReply(cut=0),
    "slow": FakeReply(delay_s=1.5),
    "id -1": FakeReply(body=b'{"result": [[{"document": {"id": -1, "contents": "x"}, "score": 1}]]}'),
    "twice": FakeReply(
        body=b'{"result": [[%b, %b]]}' % ((b'{"document": {"id": "1", "contents": "x"}, "score": 1}',) * 2)
    ),
    "too few lists": FakeReply(body=b'{"result": []}'),
    "another corpus": FakeReply(body=honest(["a"], 1).body, headers={"x-corpus-version": "v2"}),
    "other queries": FakeReply(body=honest(["b"], 1).body, headers={"x-queries-xxh3": "0" * 16}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reply_is_asked_for_again(name):
    try_timeout_s = 1.0 if name == "slow" else 30.0
    replies = first_then_honest(BROKEN[name], BROKEN[name])
    with FakeServer(replies) as server, client_of(server, try_timeout_s=try_timeout_s) as retriever:
        assert search(retriever, "a") == [["a"]]
        assert server.requests[:3] == [["a"]] * 3


def test_a_search_that_never_succeeds_says_why():
    with FakeServer(lambda *_: FakeReply(status=500, body=b"out of memory")) as server:
        with (
            client_of(server, deadline_s=2.0) as retriever,
            pytest.raises(RetrievalError, match=r"within 2 s.*out of memory"),
        ):
            search(retriever, "a")
        assert len(server.requests) >= 2


def test_a_request_the_server_will_never_serve_is_not_repeated():
    with (
        FakeServer(lambda *_: FakeReply(status=422, body=b"topk: found 99")) as server,
        client_of(server) as retriever,
    ):
        with pytest.raises(RetrievalError, match="refused the request with status 422: topk: found 99"):
            search(retriever, "a")
        assert len(server.requests) == 1
        server.behave = lambda queries, top_k, number: honest(queries, top_k)
        assert search(retriever, "a") == [["a"]]


def test_one_refused_query_does_not_drag_down_those_it_travels_with():
    def refuse_long(queries, top_k, _number):
        return FakeReply(status=413, body=b"too long") if "long" in queries else honest(queries, top_k)

    async def ask_all(retriever):
        asked = [retriever.search([query], 1) for query in ("a", "long", "b")]
        return await asyncio.gather(*asked, return_exceptions=True)

    with FakeServer(refuse_long) as server, client_of(server, gather_s=0.3) as retriever:
        ((one,),), refused, ((other,),) = asyncio.run(ask_all(retriever))
        assert (one.passage.text, other.passage.text) == ("a", "b")
        assert isinstance(refused, RetrievalError) and "status 413: too long" in str(refused)


def test_fewer_hits_than_asked_are_an_answer():
    with FakeServer(lambda *_: FakeReply(body=b'{"result": [[]]}')) as server, client_of(server) as retriever:
        assert search(retriever, "a", top_k=5) == [[]]


def test_queries_travel_together_once_and_are_remembered():
    options = {"gather_s": 0.5, "max_request_queries": 3, "cache_size": 4}
    with (
        FakeServer(lambda queries, top_k, _: honest(queries, top_k)) as server,
        client_of(server, **options) as retriever,
    ):

        async def ask_all():
            asked = [["a"], ["b", "a"], ["c"], ["d"], ["a"]]
            return await asyncio.gather(*(retriever.search(queries, 2) for queries in asked))

        found = [[hit.passage.text for (hit,) in own] for own in asyncio.run(ask_all())]
        assert found == [["a"], ["b", "a"], ["c"], ["d"], ["a"]]
        assert sorted(server.requests) == [["a", "b", "c"], ["d"]]
        assert search(retriever, "d", "a") == [["d"], ["a"]]  # another event loop, no request
        assert len(server.requests) == 2
        search(retriever, "e")  # the fifth: the one unused for longest is forgotten
        search(retriever, "a", "d")
        assert len(server.requests) == 3
        search(retriever, "b")
        assert server.requests[2:] == [["e"], ["b"]]
        search(retriever, "b", top_k=1)
        assert len(server.requests) == 5


def test_a_search_that_failed_may_be_asked_again():
    with FakeServer(first_then_honest(FakeReply(status=400))) as server, client_of(server) as retriever:
        with pytest.raises(RetrievalError):
            search(retriever, "a")
        assert search(retriever, "a") == [["a"]]


def test_the_load_is_shared_and_a_dead_server_is_left_alone():
    def fair(queries, top_k, _number):
        return honest(queries, top_k)

    with (
        FakeServer(fair) as one,
        FakeServer(fair) as two,
        client_of(one, two, breaker_open_s=60.0) as retriever,
    ):
        for n in range(10):
            search(retriever, f"q{n}")
        assert (len(one.requests), len(two.requests)) == (5, 5)
        two.behave = lambda *_: FakeReply(status=500)
        for n in range(40):
            assert search(retriever, f"r{n}") == [[f"r{n}"]]
        assert len(two.requests) == 10  # five more: then its breaker was open


def test_a_server_that_comes_back_is_asked_again():
    with (
        FakeServer(first_then_honest(*[FakeReply(status=500)] * 6)) as server,
        client_of(server) as retriever,
    ):
        assert search(retriever, "a") == [["a"]]
        assert len(server.requests) == 7  # five open the breaker, one probe fails, the next succeeds
        assert search(retriever, "b") == [["b"]]


def test_the_breaker_lets_one_probe_through():
    now = [0.0]
    endpoint = Endpoint("u", BreakerSettings(max_failures=2, open_s=10.0), lambda: now[0])
    for _ in range(2):
        assert endpoint.wait_s() == 0
        endpoint.begin()
        endpoint.end(succeeded=False)
    assert (endpoint.is_open, endpoint.wait_s()) == (True, 10.0)
    now[0] = 10.0
    assert endpoint.wait_s() == 0
    endpoint.begin()
    assert endpoint.wait_s() > 0  # the probe is on its way
    endpoint.end(succeeded=None)  # abandoned: nothing learnt
    assert endpoint.wait_s() == 0
    endpoint.begin()
    endpoint.end(succeeded=True)
    assert (endpoint.is_open, endpoint.wait_s(), endpoint.num_in_flight) == (False, 0.0, 0)


def test_the_least_busy_endpoint_is_chosen():
    busy, free, other = (
        Endpoint(url, BreakerSettings(max_failures=1, open_s=1.0), lambda: 0.0) for url in "bfo"
    )
    busy.begin()
    assert [choose([busy, free, other], turn).url for turn in range(3)] == ["f", "f", "o"]
    for endpoint in (busy, free, other):
        endpoint.begin()
        endpoint.end(succeeded=False)
    assert choose([busy, free, other], 0) is None


def test_the_corpus_of_the_endpoints_is_checked():
    with FakeServer(lambda *_: FakeReply(), "v1") as one, FakeServer(lambda *_: FakeReply(), "v2") as two:
        with pytest.raises(ConfigError, match=r"different corpora .*v1.*v2.*retriever\.sharded"):
            HttpRetriever([one.url, two.url], quick_client())
        sharded = open_retriever(
            RetrieverConfig(endpoints=(one.url, two.url), sharded=True, client=quick_client())
        )
        assert sharded.corpus_version == "v1+v2"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        RetrievalError, match=f"127.0.0.1:{port}/info gave no corpus version within 0.1 s .*ConnectError"
    ):
        HttpRetriever([f"http://127.0.0.1:{port}"], quick_client(ready_s=0.1))
    with pytest.raises(DataError, match="token_file: cannot read nowhere"):
        HttpRetriever([f"http://127.0.0.1:{port}"], quick_client(token_file="nowhere"))


def test_a_server_that_knows_search_r1s_exchange_only():
    with FakeServer(lambda queries, top_k, _: honest(queries, top_k), version="") as server:
        with pytest.raises(
            RetrievalError, match=r"status 404.*name its corpus in retriever\.client\.corpus_version"
        ):
            HttpRetriever([server.url], quick_client())
        with client_of(server, corpus_version="wiki-18") as retriever:
            assert retriever.corpus_version == "wiki-18"
            assert search(retriever, "a", "b") == [["a"], ["b"]]


def test_an_address_may_name_the_route():
    with FakeServer(lambda queries, top_k, _: honest(queries, top_k)) as server:
        assert search(HttpRetriever([server.url + "/retrieve"], quick_client()), "a") == [["a"]]


def test_what_a_server_takes_is_what_it_is_asked():
    """By its /info: longer queries are cut, and no more passages are asked for than it has."""
    asked = []

    def note(queries, top_k, _number):
        asked.append((queries, top_k))
        return honest(queries, top_k)

    with (
        FakeServer(note, limits={"max_query_bytes": 5, "max_top_k": 2}) as server,
        client_of(server) as retriever,
    ):
        search(retriever, "glass maker", top_k=9)
    assert asked == [(["glass"], 2)]


def test_shards_are_merged_by_score_then_id():
    def shard(*documents):
        hits = [
            {"document": {"id": id_, "contents": f'"t"\n{id_}'}, "score": score} for id_, score in documents
        ]
        return FakeServer(
            lambda queries, k, _: FakeReply(body=json.dumps({"result": [hits[:k]] * len(queries)}).encode())
        )

    with shard(("b", 3.0), ("c", 2.0), ("d", 1.0)) as one, shard(("a", 2.0), ("e", 2.0), ("f", 0.5)) as two:
        sharded = open_retriever(
            RetrieverConfig(endpoints=(one.url, two.url), sharded=True, client=quick_client())
        )
        assert search(sharded, "x", "y", top_k=3) == [["b", "a", "c"]] * 2


def test_a_rollout_whose_search_fails_is_no_data_and_too_many_stop_the_run():
    script = "<think>x</think><search>Lyon</search>"
    answer = "<think>x</think><answer>gold</answer>"
    with (
        FakeServer(lambda *_: FakeReply(status=500)) as server,
        client_of(server, deadline_s=0.5) as retriever,
    ):
        for max_failed_share, fails in ((0.5, False), (0.4, True)):
            engine = ScriptedEngine({"rollout 0": [script, answer], "rollout 1": [answer]})
            rollouter = Rollouter(
                engine, retriever, environment(max_failed_share=max_failed_share), top_k=1, seed=0
            )
            if fails:
                with pytest.raises(
                    RolloutError, match=r"1 of 2 rollouts failed.*retrieval_failed.*no answer to 1 queries"
                ):
                    rollouter.run([question()], step=0)
                continue
            (group,) = rollouter.run([question()], step=0)
            assert [rollout.stop_reason for rollout in group.rollouts] == [
                StopReason.RETRIEVAL_FAILED,
                StopReason.ANSWERED,
            ]
            assert group.rollouts[0].stop_reason.is_infrastructure


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_burst(tmp_path):
    """Killed twice while 400 searches are under way, started again on its port: every search gets its own
    answer."""
    corpus = small_corpus(tmp_path / "corpus")
    offline = CorpusRetriever(corpus, SearchConfig())
    queries = [f"kalo {n % 64} in {1900 + n}" for n in range(400)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def burst(retriever, process):
        asked = [asyncio.create_task(retriever.search([query], 3)) for query in queries]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        process.kill()
        return asked

    async def whole_story():
        with serving(corpus, tmp_path, f"--port={port}") as (address, process):
            retriever = HttpRetriever(
                [address], quick_client(deadline_s=120.0, max_request_queries=2, max_connections=2)
            )
            asked = await burst(retriever, process)
        with serving(corpus, tmp_path, f"--port={port}", wait=False):
            found = [hits for task in asked for hits in await task]
        retriever.close()
        return found

    assert asyncio.run(whole_story()) == offline.find(queries, 3)
