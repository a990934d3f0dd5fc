"""Rollouts as other systems store them: text, encoded anew."""

import json

import pytest

from eval.credit.transcripts import read_groups
from megatron_sd.config import RolloutConfig
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import load_codec
from tests.eval.test_credit import COMPACT, MODEL, SECOND


@pytest.fixture(scope="module")
def environment():
    return Environment(load_codec(MODEL), build_protocol(COMPACT), RolloutConfig())


RETRY = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and"
    " </search>. If I want to give the final answer, I should put the answer between <answer> and </answer>."
    " Let me try again.\n"
)


def groups_of(path, environment, *rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return read_groups(path, environment)


def queries_of(group, rollout=0):
    return [turn.query for turn in group.rollouts[rollout].turns if turn.query]


def test_the_environments_messages_are_not_the_policys_words(environment, tmp_path):
    row = {"id": 1, "question": "q?", "answer": "Riga", "response": f"I will look.{RETRY}{SECOND}"}
    (group,) = groups_of(tmp_path / "t.jsonl", environment, row)
    observed = environment.codec.decode(group.rollouts[0].turns[0].observation_ids)
    assert queries_of(group) == ["Ana  GUIDE"] and "is invalid" in observed


def test_two_questions_with_one_id_are_two_groups(environment, tmp_path):
    """Ids of FlashRAG's files are test_0 in every data set."""
    one, two = (
        {"id": "test_0", "question": f"{name}?", "answer": name, "response": SECOND}
        for name in ("Riga", "Oslo")
    )
    first, second = groups_of(tmp_path / "t.jsonl", environment, one, two, one)
    assert (len(first.rollouts), len(second.rollouts)) == (2, 1) and first.question.id != second.question.id
    assert second.question.golden_answers == ("Oslo",)


def test_a_last_line_without_a_line_break_is_a_line(environment, tmp_path):
    row = {"id": 1, "question": "q?", "answer": "Riga", "response": SECOND}
    (group,) = groups_of(tmp_path / "t.jsonl", environment, row, row, end="")
    assert len(group.rollouts) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Answer it. Question: q?\n", "output": SECOND, "gts": {"target": ["Riga"]}, "score": 1.0, "step": 3},
        {"prompt": [{"role": "user", "content": "Answer it. Question: q?\n"}], "response": SECOND, "answer": "Riga"},
        {"prompt": "Use <search> x </search>. Question: q?\n", "golden_answers": ["Riga"],
         "sequence": "Use <search> x </search>. Question: q?\n" + SECOND},
    ],
)  # fmt: skip
def test_dumps_of_verl_chats_and_whole_sequences_are_read(environment, tmp_path, row):
    (group,) = groups_of(tmp_path / "t.jsonl", environment, row)
    assert (group.question.text, group.question.golden_answers, queries_of(group)) == (
        "q?",
        ("Riga",),
        ["Ana  GUIDE"],
    )


def test_titles_may_hold_parentheses_and_quotes(environment, tmp_path):
    passages = 'Doc 1(Title: "Lena Hart (artist)") She paints.\nDoc 2(Title: Oslo) A city.'
    shown = f"<search>a</search><information>{passages}</information>"
    (group,) = groups_of(
        tmp_path / "t.jsonl", environment, {"question": "q?", "answer": "x", "response": shown}
    )
    assert [hit.passage.title for hit in group.rollouts[0].turns[0].hits] == ["Lena Hart (artist)", "Oslo"]


def test_the_form_of_a_foreign_rollout_is_judged(environment, tmp_path):
    rows = [
        {"question": "q?", "answer": "x", "response": text}
        for text in ("<answer>x</answer", "no tags at all")
    ]
    (group,) = groups_of(tmp_path / "t.jsonl", environment, *rows)
    assert [rollout.turns[0].well_formed for rollout in group.rollouts] == [False, False]
