"""Rollouts as lines: whole, in any order, and an error for what is none."""

import dataclasses
import json

import pytest

from megatron_sd.durable.files import append_lines
from megatron_sd.errors import DataError
from megatron_sd.records import StopReason
from megatron_sd.rollout.stored import StoredGroups, check_tokenizer, fields_of, group_of, read_record
from tests.builders import group, hit, rollout


def a_group(number=0):
    first = rollout(0, ["é", "b"], reward=1.0, answer="gold", number=number)
    turns = (
        dataclasses.replace(first.turns[0], hits=(hit("p1", text="line\nbreak"),), policy_version=3),
        *first.turns[1:],
    )
    failed = rollout(1, stop_reason=StopReason.ENGINE_FAILED, number=number)
    return group([dataclasses.replace(first, turns=turns), failed], number)


def test_a_group_comes_back_equal_with_ids_scores_hits_and_spans():
    own = a_group()
    line = json.dumps(fields_of(own)).encode()
    assert group_of(line, "here") == own
    assert group_of(line, "here").rollouts[0].scores.reward == 1.0
    assert group_of(line, "here").rollouts[1].scores is None


def test_a_line_from_before_there_were_tools_is_read():
    own = a_group()
    fields = fields_of(own)
    for stored in fields["rollouts"]:
        for turn in stored["turns"]:
            action = turn.pop("action")
            turn["query"], turn["query_span"] = (
                (None, None) if action is None else (action["text"], action["span"])
            )
    assert group_of(json.dumps(fields).encode(), "here") == own


def test_groups_are_read_by_place_and_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    groups = [a_group(number) for number in range(4)]
    append_lines(path, map(fields_of, groups))
    with path.open("ab") as file:
        file.write(b'{"question": {"id"')
    stored = StoredGroups(path)
    assert len(stored) == 4
    assert list(stored) == groups
    assert [stored[place] for place in (2, 0, 3, -1)] == [groups[2], groups[0], groups[3], groups[3]]


@pytest.mark.parametrize(
    "line", [b"[]\n", b"{}\n", b"no json\n", b'{"question": {"id": 1}, "rollouts": []}\n']
)
def test_a_line_that_is_no_group_is_named(tmp_path, line):
    path = tmp_path / "rollouts.jsonl"
    append_lines(path, [fields_of(a_group())])
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match="rollouts.jsonl:2 is no question with rollouts"):
        list(StoredGroups(path))
    with pytest.raises(DataError, match="rollouts.jsonl:2 is no question with rollouts"):
        StoredGroups(path)[1]
    with pytest.raises(DataError, match="nothing.jsonl does not exist; expected rollouts that"):
        StoredGroups(tmp_path / "nothing.jsonl")


def test_a_directory_that_nobody_finished_and_ids_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="holds no episodes.json, expected a directory that `sd-search select` finished"
    ):
        read_record(tmp_path / "episodes.json", "sd-search select")
    (tmp_path / "episodes.json").write_text("[1")
    with pytest.raises(DataError, match="episodes.json is no JSON object"):
        read_record(tmp_path / "episodes.json", "sd-search select")
    check_tokenizer("abc", {"tokenizer": "abc"}, tmp_path)
    with pytest.raises(DataError, match="holds ids of another tokenizer: xyz .of models/a., expected abc"):
        check_tokenizer("abc", {"tokenizer": "xyz", "model": "models/a"}, tmp_path)
