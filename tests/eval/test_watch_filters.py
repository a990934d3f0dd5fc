"""What `sd-search watch` looks for among rollouts, by records made by hand."""

import pytest

from eval.watch.filters import (
    FILTERS,
    Matches,
    count,
    is_truncated,
    is_wrong_despite_gold,
    repeats_a_query,
    retrieval_failed,
    tags,
)

QUESTION = {"supporting": [["p1", "p2"], ["p9"]]}


def turn(query=None, *hits):
    return {"query": query, "hits": [{"passage": {"id": name}} for name in hits]}


def rollout(*turns, em=0.0, stop="answered"):
    return {"turns": list(turns), "scores": None if em is None else {"em": em}, "stop_reason": stop}


@pytest.mark.parametrize(
    ("record", "holds"),
    [
        (rollout(turn("who", "p7", "p2"), turn()), True),
        (rollout(turn("who", "p7"), turn("where", "p9")), True),
        (rollout(turn("who", "p2"), em=1.0), False),
        (rollout(turn("who", "p2"), em=0.5), True),
        (rollout(turn("who", "p7"), turn("where")), False),
        (rollout(turn("who", "p2"), em=None, stop="retrieval_failed"), False),
        (rollout(turn("who", "p2"), stop="token_limit"), True),
        (rollout(), False),
    ],
)
def test_wrong_although_a_gold_passage_was_seen(record, holds):
    assert is_wrong_despite_gold(record, QUESTION) is holds


def test_without_known_gold_passages_none_was_seen():
    assert not is_wrong_despite_gold(rollout(turn("who", "p2")), {"supporting": []})


@pytest.mark.parametrize(
    ("queries", "holds"),
    [
        (("who is it", "Who  is\tIT "), True),
        (("who is it", "who is he"), False),
        (("who", None, "who"), True),
        ((None, None), False),
        ((), False),
    ],
)
def test_a_query_that_is_repeated(queries, holds):
    assert repeats_a_query(rollout(*map(turn, queries)), QUESTION) is holds


@pytest.mark.parametrize(
    ("stop", "truncated", "failed"),
    [
        ("answered", False, False),
        ("no_action", False, False),
        ("turn_limit", True, False),
        ("token_limit", True, False),
        ("retrieval_failed", False, True),
        ("engine_failed", False, False),
        ("tool_failed", False, False),
    ],
)
def test_how_a_rollout_ended(stop, truncated, failed):
    record = rollout(stop=stop)
    assert (is_truncated(record, QUESTION), retrieval_failed(record, QUESTION)) == (truncated, failed)


def test_groups_and_rollouts_are_counted():
    both = rollout(turn("who", "p1"), turn("who"), stop="turn_limit")
    groups = [
        {"question": QUESTION, "rollouts": [both, rollout(turn("who"), turn("who"), em=1.0)]},
        {"question": QUESTION, "rollouts": [rollout(stop="token_limit"), rollout(em=1.0)]},
        {"question": QUESTION, "rollouts": []},
    ]
    assert count(groups) == {
        "wrong-despite-gold": Matches(groups=1, rollouts=1),
        "repeated-query": Matches(groups=1, rollouts=2),
        "truncated": Matches(groups=2, rollouts=2),
        "retrieval-failed": Matches(groups=0, rollouts=0),
    }
    assert list(tags(both, QUESTION)) == ["wrong-despite-gold", "repeated-query", "truncated"]
    assert tags(both, QUESTION)["truncated"] == FILTERS["truncated"].title
