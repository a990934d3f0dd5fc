"""A search that is made again with a query sampled behind another prompt."""

from dataclasses import replace

import pytest

from megatron_sd.algorithm.evidence import AskedTurn
from megatron_sd.errors import RolloutError
from tests.builders import hit
from tests.rollout.fakes import InlineRetriever, codec, environment
from tests.rollout.test_rollouter import ANSWER, SEARCH, run, scripted


def asked_again(script, *, retriever=None, **limits):
    """A rollout of two searches whose second query is asked for again, and the rollouter that asks by the
    script."""
    (done,) = run(scripted([SEARCH.format("Lyon"), SEARCH.format("Paris"), ANSWER])[0])
    rollouter, engine, retriever = scripted([script], retriever=retriever, **limits)
    asked = AskedTurn(rollout=done, turn=1, prompt_ids=codec().encode("Another prompt: "))
    return asked, rollouter, engine, retriever


def test_a_search_is_made_again_behind_another_prompt():
    """The turn's own words stay up to where its query begins; the rest is sampled greedily and searched for."""
    asked, rollouter, engine, retriever = asked_again(" mayor of Nice </search>")
    assert rollouter.search_again([asked]) == [(hit("p0", "about mayor of Nice"),)]
    assert retriever.queries == ["mayor of Nice"]
    (request,) = engine.requests
    first, second, _ = asked.rollout.turns
    begun = second.completion_ids[: second.query_span[0]]
    assert codec().decode(begun) == "<think>a</think><search>"
    assert request.prompt_ids == (*asked.prompt_ids, *first.completion_ids, *first.observation_ids, *begun)
    assert request.temperature == 0.0 and request.stop == environment().protocol.stop_strings
    assert request.max_new_tokens == environment().limits.max_turn_tokens - len(begun)
    assert engine.released == [request.session] and engine.moods == ["wakes", "sleeps"]


def test_what_comes_to_no_search_is_none():
    asked, rollouter, _, retriever = asked_again("nothing that ends")
    assert rollouter.search_again([asked]) == [None] and retriever.queries == []
    assert rollouter.search_again([]) == []
    turn = asked.rollout.turns[1]
    long = len(turn.completion_ids[: turn.query_span[0]])
    _, rollouter, engine, _ = asked_again(" mayor of Nice </search>", max_turn_tokens=long)
    assert rollouter.search_again([asked]) == [None] and engine.requests == []


def test_an_engine_that_fails_for_one_query_ends_nothing():
    asked, rollouter, engine, _ = asked_again(" mayor of Nice </search>", max_failed_share=0.5)
    other = replace(asked, prompt_ids=codec().encode("A third prompt: "))
    generate = engine.generate

    async def fails_once(request):
        if request.prompt_ids[: len(other.prompt_ids)] == other.prompt_ids:
            raise RolloutError("the server is lost")
        return await generate(request)

    engine.generate = fails_once
    assert rollouter.search_again([asked, other]) == [(hit("p0", "about mayor of Nice"),), None]
    with pytest.raises(
        RolloutError, match="1 of 1 searches by the teacher's queries failed.*the server is lost"
    ):
        rollouter.search_again([other])


def test_the_teachers_longer_prompt_takes_no_room_from_its_query():
    asked, *_ = asked_again("")
    first, second, _ = asked.rollout.turns
    held = sum(map(len, (asked.rollout.prompt_ids, first.completion_ids, first.observation_ids)))
    long = replace(asked, prompt_ids=codec().encode("A long block of others' attempts. ") * 20)
    _, rollouter, engine, _ = asked_again(" mayor of Nice </search>", max_rollout_tokens=held + 60)
    assert rollouter.search_again([long]) == [(hit("p0", "about mayor of Nice"),)]
    assert engine.requests[0].max_new_tokens == 60 - second.query_span[0]


def test_searches_that_fail_are_none_unless_too_many_do():
    down = InlineRetriever(fails_on="Nice")
    asked, rollouter, *_ = asked_again(" mayor of Nice </search>", retriever=down, max_failed_share=1.0)
    assert rollouter.search_again([asked]) == [None]
    asked, rollouter, *_ = asked_again(" mayor of Nice </search>", retriever=down)
    with pytest.raises(
        RolloutError, match=r"1 of 1 searches by the teacher's queries failed, expected at most 20% .*is down"
    ):
        rollouter.search_again([asked])
