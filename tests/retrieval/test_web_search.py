"""Searches of the web against a server that answers as Serper and SearXNG do, on this machine: what is asked,
recorded, replayed, blocked and refused."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from megatron_sd.config import RetrieverConfig, WebSearchConfig
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.records import Passage
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.remote.web_engines import WEB_ENGINES, read_passages
from megatron_sd.retrieval.remote.web_search import is_blocked
from megatron_sd.retrieval.remote.web_store import WebStore

SERPER = [
    {"title": "Lyon", "link": "https://en.wikipedia.org/wiki/Lyon", "snippet": "A city.", "position": 1},
    {"title": "Leak", "link": "https://data.benchmarks.org/answers", "snippet": "The answer."},
    {"title": "Mayor", "link": "https://lyon.fr/mayor"},
]
MADE_BY = {"engine": "serper", "url": "u", "num_results": 10}


class Engine:
    """What was asked of it, and what it shall answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict, dict]] = []
        self.replies: list[tuple[int, object]] = []
        self.url = ""

    def answer(self, method: str, path: str, headers: dict, body: dict) -> tuple[int, object]:
        self.asked.append((method, path, headers, body))
        return self.replies.pop(0) if self.replies else (200, {"organic": SERPER})


@contextmanager
def serving() -> Iterator[Engine]:
    engine = Engine()

    class Answers(BaseHTTPRequestHandler):
        def _answer(self):
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, content = engine.answer(self.command, self.path, headers, body)
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):  # noqa: N802
            self._answer()

        def do_POST(self):  # noqa: N802
            self._answer()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    engine.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def engine():
    with serving() as engine:
        yield engine


def web(tmp_path, server=None, **options):
    (tmp_path / "key").write_text("secret\n")
    given = {
        "engine": "serper",
        "store": str(tmp_path / "store.jsonl"),
        "url": server and server.url,
        "token_file": str(tmp_path / "key"),
        "deadline_s": 5.0,
    }
    return open_retriever(RetrieverConfig(web=WebSearchConfig(**(given | options)), top_k=3))


def search(retriever, *queries, top_k=3):
    return asyncio.run(retriever.search(list(queries), top_k))


def test_serper_is_asked_once_and_its_results_are_passages(tmp_path, engine):
    own = web(tmp_path, engine, mode="record")
    (hits,) = search(own, "mayor of Lyon", top_k=2)
    assert [(h.passage.id, h.passage.title, h.passage.text, h.score) for h in hits] == [
        ("https://en.wikipedia.org/wiki/Lyon", "Lyon", "A city.", 1.0),
        ("https://data.benchmarks.org/answers", "Leak", "The answer.", 0.5),
    ]
    method, _, headers, body = engine.asked[0]
    assert (method, headers["x-api-key"], body) == ("POST", "secret", {"q": "mayor of Lyon", "num": 10})
    first, second = search(own, "mayor of Lyon", "mayor of Lyon")
    assert len(engine.asked) == 1 and first == second and len(first) == 3
    assert first[2].passage.text == ""


def test_the_same_question_asked_at_one_time_is_sent_once(tmp_path, engine):
    search(web(tmp_path, engine, mode="record"), *["a"] * 9, "b")
    assert sorted(body["q"] for *_, body in engine.asked) == ["a", "b"]


def test_searxng_is_asked_by_address(tmp_path, engine):
    engine.replies = [(200, {"results": [{"url": "https://a.org", "title": "A", "content": "text"}]})]
    own = web(tmp_path, engine, mode="record", engine="searxng", token_file=None)
    (hits,) = search(own, "who & what?")
    assert (hits[0].passage.id, hits[0].passage.text) == ("https://a.org", "text")
    method, path, headers, _ = engine.asked[0]
    assert method == "GET" and "authorization" not in headers
    assert (urlsplit(path).path, parse_qs(urlsplit(path).query)) == (
        "/search",
        {"q": ["who & what?"], "format": ["json"]},
    )


def test_what_was_recorded_is_replayed_without_a_network(tmp_path):
    with serving() as engine:
        recorded = search(web(tmp_path, engine, mode="record"), "a", 'é\n"q"')
        url = engine.url
    own = web(tmp_path, SimpleNamespace(url=url))  # nobody listens there any more
    assert search(own, "a", 'é\n"q"') == recorded
    with pytest.raises(
        DataError, match=r"store.jsonl holds no search for 'b'; expected every query .* record"
    ):
        search(own, "a", "b")
    assert own.corpus_version == web(tmp_path, SimpleNamespace(url=url)).corpus_version
    assert (
        own.corpus_version != web(tmp_path, SimpleNamespace(url=url), blocked_domains=("x",)).corpus_version
    )


def test_a_replay_never_asks_though_the_engine_is_there(tmp_path, engine):
    web(tmp_path, engine, mode="record")
    with pytest.raises(DataError, match="holds no search for 'a'"):
        search(web(tmp_path, engine), "a")
    assert engine.asked == []


def test_the_budget_holds_over_restarts_and_processes(tmp_path, engine):
    search(web(tmp_path, engine, mode="record", max_calls=2), "a")
    first, second = (web(tmp_path, engine, mode="record", max_calls=2) for _ in range(2))
    search(first, "b")
    with pytest.raises(
        RetrievalError, match=r"max_calls: .*store.jsonl holds 2 searches and 0 are being made, which is"
    ):
        search(second, "c")
    assert len(search(second, "b")[0]) == 3 and len(engine.asked) == 2


def test_blocked_domains_are_left_out_and_others_move_up(tmp_path, engine):
    own = web(tmp_path, engine, mode="record", blocked_domains=("Benchmarks.org",))
    (hits,) = search(own, "a", top_k=2)
    assert [(h.passage.title, h.score) for h in hits] == [("Lyon", 1.0), ("Mayor", 0.5)]
    assert len(search(web(tmp_path, engine), "a")[0]) == 3


@pytest.mark.parametrize(
    ("url", "blocked"),
    [
        ("https://huggingface.co/datasets/x", True),
        ("https://cdn.HuggingFace.co:443/x", True),
        ("https://huggingface.co./x", True),
        ("https://nothuggingface.co/x", False),
        ("https://a.org/huggingface.co", False),
        ("https://user@huggingface.co/x", True),
        ("huggingface.co/x", True),
        ("https://[broken", True),
    ],
)
def test_a_domain_and_all_below_it(url, blocked):
    assert is_blocked(url, ("huggingface.co",)) is blocked
    assert not is_blocked(url, ())


@pytest.mark.parametrize(
    "domain",
    [
        "https://huggingface.co",
        "huggingface.co/datasets",
        "*.huggingface.co",
        "huggingface.co:443",
        "",
        "a b",
    ],
)
def test_a_domain_that_would_block_nothing_is_refused(tmp_path, engine, domain):
    with pytest.raises(ConfigError, match="blocked_domains: found .*expected a bare domain such as"):
        web(tmp_path, engine, mode="record", blocked_domains=(domain,))


def test_domains_are_compared_in_one_spelling(tmp_path, engine):
    engine.replies = [
        (200, {"organic": [{"link": "https://a.xn--mnchen-3ya.de/x", "title": "A"}, SERPER[0]]})
    ]
    own = web(tmp_path, engine, mode="record", blocked_domains=(" MÜNCHEN.de.",))
    assert [hit.passage.title for hit in search(own, "a")[0]] == ["Lyon"]


def test_an_engine_that_could_ask_nobody_has_found_nothing_to_record(tmp_path, engine):
    engine.replies = [(200, {"message": "quota exhausted"})]
    with pytest.raises(RetrievalError, match="expected JSON with a list 'organic'"):
        search(web(tmp_path, engine, mode="record"), "a")
    own = web(
        tmp_path, engine, mode="record", engine="searxng", store=str(tmp_path / "s.jsonl"), deadline_s=9.0
    )
    busy = {"results": [], "unresponsive_engines": [["google", "too many requests"]]}
    engine.replies = [(200, busy), (200, {"results": [], "unresponsive_engines": []})]
    assert search(own, "a") == [()] and len(engine.asked) == 3
    assert (tmp_path / "store.jsonl").read_text().count("query") == 0


def refused_of_twelve_at_one_time(retriever) -> int:
    async def all_at_once():
        searches = (retriever.search([f"q{n}"], 3) for n in range(12))
        return await asyncio.gather(*searches, return_exceptions=True)

    return sum(isinstance(one, RetrievalError) for one in asyncio.run(all_at_once()))


def test_the_budget_holds_for_searches_at_one_time(tmp_path, engine):
    own = web(tmp_path, engine, mode="record", max_calls=2, max_connections=8)
    assert refused_of_twelve_at_one_time(own) == 10
    assert len(engine.asked) == 2


class SlowLock:
    """Whoever lets go of it lets others in before going on."""

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()
        time.sleep(0.02)


def test_the_budget_knows_of_a_search_between_its_answer_and_the_store(tmp_path, engine):
    own = web(tmp_path, engine, mode="record", max_calls=1, max_connections=4)
    own._lock = SlowLock()
    assert refused_of_twelve_at_one_time(own) == 11
    assert len(engine.asked) == 1


def test_who_gives_up_waiting_ends_nobody_elses_search(tmp_path, engine):
    own = web(tmp_path, engine, mode="record", max_connections=1)

    async def one_gives_up():
        first = asyncio.create_task(own.search(["a"], 3))
        gives_up, waits = (asyncio.create_task(own.search(["b"], 3)) for _ in range(2))
        await asyncio.sleep(0)
        gives_up.cancel()
        return await first, await waits

    assert len(asyncio.run(one_gives_up())[1][0]) == 3
    assert len(search(own, "b")[0]) == 3


def test_a_lone_surrogate_is_a_question_mark(tmp_path, engine):
    own = web(tmp_path, engine, mode="record")
    assert search(own, "x\ud800y") == search(own, "x?y") and engine.asked[0][3]["q"] == "x?y"


def test_an_engine_that_recovers_is_asked_again_and_one_that_refuses_is_not(tmp_path, engine):
    own = web(tmp_path, engine, mode="record")
    engine.replies = [(429, "slow down"), (503, "busy")]
    assert len(search(own, "a")[0]) == 3 and len(engine.asked) == 3
    engine.replies = [(401, "no such key")]
    with pytest.raises(RetrievalError, match=r"status 401: no such key$"):
        search(own, "b")
    assert len(engine.asked) == 4
    engine.replies = [(200, "<html>")]
    with pytest.raises(RetrievalError, match="retriever.web: http://127.0.0.1:"):
        search(own, "c")
    engine.replies = [(200, {"organic": "none"})]
    with pytest.raises(RetrievalError, match="expected JSON with a list 'organic'"):
        search(own, "d")
    engine.replies = [(500, "x")] * 99
    with pytest.raises(RetrievalError, match=r"status 500: x \(\d+ tries\)"):
        search(web(tmp_path, engine, mode="record", deadline_s=0.5), "e")
    assert (tmp_path / "store.jsonl").read_text().splitlines()[1:] == [
        json.dumps({"query": "a", "passages": [vars_of(found) for found in SERPER]})
    ]


def vars_of(found):
    return {"id": found["link"], "title": found["title"], "text": found.get("snippet", "")}


def test_replies_are_read_each_address_once():
    serper = WEB_ENGINES["serper"]
    assert read_passages({"organic": [*SERPER, *SERPER, {"title": "no address"}]}, serper, 2) == [
        Passage(id=one["link"], title=one["title"], text=one["snippet"]) for one in SERPER[:2]
    ]
    assert read_passages({"searchParameters": {}}, serper, 9) == []
    with pytest.raises(ValueError, match="expected JSON with a list 'results'"):
        read_passages({"organic": []}, WEB_ENGINES["searxng"], 9)


def test_of_two_answers_to_a_query_the_first_stands_for_all(tmp_path):
    path = tmp_path / "s.jsonl"
    first, second = (WebStore(path, MADE_BY, may_add=True) for _ in range(2))
    one, two = (Passage(id=url, title="", text="") for url in ("https://1", "https://2"))
    assert first.keep("q", [one]) == (one,)
    assert second.find("q") is None and second.keep("q", [two]) == (one,)
    assert path.read_text().count('"query"') == 1


def test_half_a_line_is_left_for_later_and_cut_by_who_adds(tmp_path):
    path = tmp_path / "s.jsonl"
    WebStore(path, MADE_BY, may_add=True).keep("a", [])
    with path.open("a") as file:
        file.write('{"query": "b", "pa')
    read = WebStore(path, MADE_BY, may_add=False)
    assert len(read) == 1 and read.find("b") is None
    added = WebStore(path, MADE_BY, may_add=True)
    added.keep("c", [])
    read.refresh()
    assert (len(added), len(read), read.find("c")) == (2, 2, ())


def test_a_store_that_is_none_or_of_another_engine_is_refused(tmp_path, engine):
    with pytest.raises(
        DataError, match=r"found no file .*store.jsonl to replay, expected one that a run with"
    ):
        web(tmp_path, engine)
    web(tmp_path, engine, mode="record")
    with pytest.raises(
        ConfigError, match=r"holds answers of .*'num_results': 10.*, expected .*'num_results': 20"
    ):
        web(tmp_path, engine, num_results=20)
    (tmp_path / "store.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match="is no record of web searches .KeyError"):
        web(tmp_path, engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_file": None}, "token_file: found none, expected a file with the key of serper"),
        ({"engine": "searxng", "url": None}, "url: found none, expected where searxng is"),
        ({"num_results": 2}, "num_results: found 2, expected at least retriever.top_k, 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        web(tmp_path, mode="record", **options)


def test_it_is_one_of_the_retrievers(tmp_path):
    config = RetrieverConfig(corpus="c", web=WebSearchConfig(engine="serper", store="s"))
    with pytest.raises(ConfigError, match="found corpus and web, expected one"):
        check_ranges(SimpleNamespace(retriever=config))
