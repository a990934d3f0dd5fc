"""Queries that distil where the teacher's own found more."""

from dataclasses import replace

import pytest

from megatron_sd.algorithm.assemble import Teaching
from megatron_sd.algorithm.evidence import AskedTurn, finds_more, teach_by_evidence
from megatron_sd.algorithm.samples import SCOPES
from megatron_sd.records import StopReason
from tests.builders import group, hit, question, rollout

ASKED = question(supporting=[["p1"], ["p2", "p3"]])


def searched(*found, index=0, stop_reason=StopReason.ANSWERED):
    """A rollout of as many searches, each with the passages that it found."""
    made = rollout(index, [f"query {n}" for n in range(len(found))], stop_reason=stop_reason)
    turns = [
        replace(turn, hits=tuple(map(hit, ids))) for turn, ids in zip(made.turns, (*found, ()), strict=True)
    ]
    return replace(made, turns=tuple(turns))


@pytest.mark.parametrize(
    ("earlier", "own", "teachers", "more"),
    [
        ([], [], ["p1"], True),
        ([], ["p1"], ["p1"], False),
        ([], ["p1"], ["p2"], False),  # another hop, but no more of them
        ([], ["p1"], ["p1", "p3"], True),
        (["p1"], [], ["p1"], False),  # that hop was served before
        (["p1"], [], ["p3"], True),
        (["p2"], ["p1"], ["p3"], False),
        ([], ["p9"], [], False),
    ],
)
def test_more_hops_that_were_open(earlier, own, teachers, more):
    made = searched(earlier, own)
    assert finds_more(ASKED, made, 1, list(map(hit, teachers))) is more
    assert not finds_more(question(), made, 1, list(map(hit, teachers)))


def taught(*rollouts, prompts, found, scope="query"):
    """The prompts that are left, and what was asked. found: of each asked turn, the ids, or None."""
    own, heard = replace(group(rollouts), question=ASKED), []

    def teach(groups, advantages, step, numbers):
        assert (groups, advantages, step, numbers) == ([None, own], "advantages", 4, [1])
        return [Teaching(["a block"] * len(rollouts), prompts)]

    def ask(asked):
        heard.extend(asked)
        return [None if ids is None else tuple(map(hit, ids)) for ids in found]

    arguments = ([None, own], "advantages", 4, [1])
    (one,) = teach_by_evidence(*arguments, teach=teach, scope=SCOPES[scope], ask=ask)
    assert one.texts == ["a block"] * len(rollouts)
    return one.prompts, heard


def test_turns_of_a_better_query_keep_their_prompt():
    first, second = searched([], ["p1"]), searched([], index=1)
    left, asked = taught(first, second, prompts=[((7, 8),), ((7, 9),)], found=[["p1"], ["p1"], None])
    assert left == [((7, 8), None, None), ()]
    assert asked == [
        AskedTurn(rollout=first, turn=0, prompt_ids=(7, 8)),
        AskedTurn(rollout=first, turn=1, prompt_ids=(7, 8)),
        AskedTurn(rollout=second, turn=0, prompt_ids=(7, 9)),
    ]


def test_what_does_not_distil_is_not_asked_for():
    """A closed gate, a failure, a turn outside of the scope, a turn without a prompt of its own."""
    closed, failed = searched([]), searched([], index=1, stop_reason=StopReason.ENGINE_FAILED)
    assert taught(closed, failed, prompts=[(), ((7,),)], found=[]) == ([(), ()], [])
    two = searched([], [])
    left, asked = taught(two, prompts=[((7, 8),)], found=[["p2"]], scope="last_query")
    assert left == [(None, (7, 8), None)] and [one.turn for one in asked] == [1]
    left, asked = taught(two, prompts=[(None, (7, 9), None)], found=[["p2"]])
    assert left == [(None, (7, 9), None)] and [one.turn for one in asked] == [1]
