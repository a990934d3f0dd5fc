"""Search-R1's exchange, written out by hand from its documented form, read and produced byte for byte."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.errors import RetrievalError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.corpus.passages import join_contents, split_contents
from megatron_sd.retrieval.queries import fit_query
from megatron_sd.retrieval.service.wire import (
    RequestError,
    RequestLimits,
    SearchOrder,
    parse_order,
    parse_reply,
    queries_digest,
    render_order,
    render_reply,
)

LIMITS = RequestLimits(max_queries=3, max_query_bytes=16, max_top_k=10, default_top_k=3)
STRICT = dataclasses.replace(LIMITS, is_strict=True)
WOOD = Passage(id="7", title="Ed Wood (film)", text="Ed Wood is a 1994 film by “Tim”.")
ORAN = Passage(id="12", title='The "Oran"', text="A city.\nIn Algeria.")
EXCHANGES = [  # request, its queries, the hits, reply
    (
        b'{"queries": ["who made Ed Wood"], "topk": 2, "return_scores": true}',
        ["who made Ed Wood"],
        [[Hit(passage=WOOD, score=12.5), Hit(passage=ORAN, score=0.25)]],
        (
            '{"result":[[{"document":{"id":"7","contents":"\\"Ed Wood (film)\\"\\nEd Wood is a 1994 film by'
            ' “Tim”."},"score":12.5},{"document":{"id":"12","contents":"\\"The \\"Oran\\"\\"\\nA city.\\nIn'
            ' Algeria."},"score":0.25}]]}'
        ),
    ),
    (
        b'{"queries": ["a", "b"], "topk": 1, "return_scores": false}',
        ["a", "b"],
        [[Hit(passage=ORAN, score=3.0)], []],
        '{"result":[[{"id":"12","contents":"\\"The \\"Oran\\"\\"\\nA city.\\nIn Algeria."}],[]]}',
    ),
    (b'{"query": "a", "topk": 1}', ["a"], [[Hit(passage=ORAN, score=3.0)]], None),
    (
        b'{"queries": ["a", "b", "c"], "topk": null, "return_scores": true}',
        list("abc"),
        [[], [], []],
        '{"result":[[],[],[]]}',
    ),
]


@pytest.mark.parametrize(("request_body", "queries", "hits", "reply"), EXCHANGES)
def test_a_recorded_exchange(request_body, queries, hits, reply):
    order = parse_order(request_body, LIMITS)
    assert list(order.queries) == queries
    body = render_reply(hits, return_scores=order.return_scores)
    assert reply is None or body == reply.encode()
    if order.return_scores:
        assert parse_reply(body, num_queries=len(queries), top_k=order.top_k) == [tuple(own) for own in hits]


def test_our_request_is_search_r1s():
    order = SearchOrder(queries=("é", "b"), top_k=3, return_scores=True)
    assert json.loads(render_order(order)) == {"queries": ["é", "b"], "topk": 3, "return_scores": True}
    assert parse_order(render_order(order), LIMITS) == order


REFUSED = [
    (b"{", 400, "no JSON"),
    (b'{"queries": ["\xff"]}', 400, "no JSON"),
    (b"[" * 10_000, 400, "no JSON"),
    (b'{"queries":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, "no JSON"),
    (b"[]", 422, "found a JSON list"),
    (b"{}", 422, "queries: found None"),
    (b'{"queries": ["a", 5]}', 422, "queries[1]: found 5"),
    (b'{"queries": ["a", "a", "a", "a"]}', 413, "found 4, expected at most 3"),
    (b'{"queries": ["a"], "topk": true}', 422, "topk: found True"),
    (b'{"queries": ["a"], "topk": -1}', 422, "topk: found -1"),
    (b'{"queries": ["a"], "topk": "many"}', 422, "topk: found 'many'"),
    (b'{"queries": ["a"], "return_scores": "perhaps"}', 422, "return_scores: found 'perhaps'"),
]
REFUSED_BY_A_STRICT_SERVER = [
    (b'{"queries": []}', 422, "queries: found []"),
    (b'{"queries": "a"}', 422, "queries: found 'a'"),
    (b'{"queries": ["a", ""]}', 422, "queries[1]: found ''"),
    (b'{"query": " "}', 422, "queries[0]: found ' '"),
    (b'{"queries": ["\\ud800"]}', 422, "lone surrogate"),
    (b'{"queries": ["' + b"a" * 17 + b'"]}', 413, "queries[0]: found 17 bytes, expected at most 16"),
    (b'{"queries": ["a"], "topk": 11}', 422, "topk: found 11, expected a whole number from 1 to 10"),
    (b'{"queries": ["a"], "topk": 0}', 422, "topk: found 0"),
    (b'{"queries": ["a"], "topk": "3"}', 422, "topk: found '3'"),
    (b'{"queries": ["a"], "return_scores": 1}', 422, "return_scores: found 1"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_what_is_no_request_is_refused_by_field(body, status, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        parse_order(body, LIMITS)
    assert caught.value.status == status


@pytest.mark.parametrize(("body", "status", "message"), REFUSED + REFUSED_BY_A_STRICT_SERVER)
def test_a_strict_server_refuses_what_a_lenient_one_answers(body, status, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        parse_order(body, STRICT)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("fields", "queries", "top_k", "return_scores"),
    [
        ({"queries": []}, [], 3, False),  # a turn in which every rollout answers
        ({"queries": "a"}, ["a"], 3, False),
        ({"queries": ["", "a", " " * 40]}, ["", "a", " " * 40], 3, False),
        ({"queries": ["a"], "topk": 0}, ["a"], 3, False),
        ({"queries": ["a"], "topk": 100}, ["a"], 10, False),
        ({"queries": ["a"], "topk": "2"}, ["a"], 2, False),
        ({"query": "a", "top_k": 5}, ["a"], 5, False),
        ({"query": ["a", "b"]}, ["a", "b"], 3, False),
        ({"queries": ["a"], "return_scores": 1}, ["a"], 3, True),
        ({"queries": ["a"], "return_scores": None}, ["a"], 3, False),
    ],
)
def test_requests_of_other_clients_are_understood(fields, queries, top_k, return_scores):
    order = parse_order(json.dumps(fields).encode(), LIMITS)
    assert (list(order.queries), order.top_k, order.return_scores) == (queries, top_k, return_scores)


@pytest.mark.parametrize(
    ("query", "fitted"),
    [
        ("glass", "glass"),
        ("glass maker of Oslo", "glass maker of O"),
        ("a" * 15 + "é", "a" * 15),
        ("\ud800b", "\ufffdb"),
    ],
)
def test_a_query_is_cut_between_characters(query, fitted):
    assert fit_query(query, 16) == fitted


def _scored(id_="1", score=1.0, contents='"t"\nx'):
    return {"document": {"id": id_, "contents": contents}, "score": score}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b'{"result": [[{"document": {"id": "1"', "not of Search-R1's form"),
        (b"<html>", "not of Search-R1's form"),
        ({"results": []}, "KeyError"),
        ({"result": [[{"id": "1", "text": "x"}]]}, "KeyError"),
        ({"result": [[_scored(id_=-1)]]}, "has the id -1"),
        ({"result": [[_scored(id_=None)]]}, "has the id None"),
        ({"result": [[_scored(score=None)]]}, "has the score None"),
        ({"result": [[_scored(score=float("nan"))]]}, "has the score nan"),
        ({"result": [[_scored(), _scored()]]}, "at most 2 different"),
        ({"result": [[_scored("1"), _scored("2"), _scored("3")]]}, "at most 2 different"),
        ({"result": []}, "answered 0 queries, expected 1"),
        ({"result": [[], []]}, "answered 2 queries, expected 1"),
    ],
)
def test_a_reply_that_is_no_answer_is_refused(reply, message):
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    with pytest.raises(RetrievalError, match=message):
        parse_reply(body, num_queries=1, top_k=2)


@pytest.mark.parametrize(
    ("entry", "id_", "score"),
    [
        # its BM25 server
        ({"document": {"title": "t", "text": "x", "contents": '"t"\nx'}, "score": 11.2}, "contents:", 11.2),
        ({"document": {"contents": '"t"\nx'}}, "contents:", 1.0),  # its web servers
        ({"id": 7, "contents": '"t"\nx'}, "7", 1.0),  # one that does not know return_scores
    ],
)
def test_replies_of_search_r1s_other_servers_are_read(entry, id_, score):
    body = json.dumps({"result": [[entry], []]}).encode()
    (hit,), nothing = parse_reply(body, num_queries=2, top_k=3)
    assert hit.passage.id.startswith(id_) and (hit.passage.title, hit.passage.text, hit.score) == (
        "t",
        "x",
        score,
    )
    assert nothing == () and parse_reply(body, num_queries=2, top_k=3)[0] == (hit,), (
        "the same contents have the same id"
    )


def test_without_scores_the_order_is_the_score():
    entries = [{"document": {"contents": text}} for text in ("a\nx", "b\nx")]
    ((one, two),) = parse_reply(json.dumps({"result": [entries]}).encode(), num_queries=1, top_k=3)
    assert (one.score, two.score) == (1.0, 0.5) and one.passage.id != two.passage.id


def test_fewer_hits_than_asked_and_ids_of_other_servers_are_answers():
    reply = json.dumps({"result": [[_scored(id_=5, contents="Bare title\ntext")]]}).encode()
    ((hit,),) = parse_reply(reply, num_queries=1, top_k=3)
    assert hit == Hit(passage=Passage(id="5", title="Bare title", text="text"), score=1.0)


@given(st.text().filter(lambda title: "\n" not in title), st.text())
def test_contents_go_there_and_back(title, text):
    assert split_contents(join_contents(Passage(id="1", title=title, text=text))) == (title, text)


def test_the_digest_depends_on_order():
    assert queries_digest(["a", "b"]) != queries_digest(["b", "a"])
    assert queries_digest(["a", "b"]) == queries_digest(("a", "b"))
