"""Question files and their order."""

import json

import pytest

from megatron_sd.errors import DataError
from megatron_sd.records import Question
from megatron_sd.search.questions import QuestionStream, load_questions


def write(tmp_path, lines):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def record(number, split="train"):
    return json.dumps(
        {"id": f"q{number}", "text": f"Question {number}?", "golden_answers": ["ab"], "split": split}
    )


def test_reads_fields_split_and_limit(tmp_path):
    full = {
        "id": 1,
        "text": "Who?",
        "golden_answers": ["x", "y"],
        "source": "s",
        "split": "eval",
        "supporting": [["p1", "p2"], ["p3"]],
    }
    path = write(tmp_path, [record(0), json.dumps(full), record(2), record(3)])
    assert load_questions(path, split="eval") == (
        Question(
            id="1",
            text="Who?",
            golden_answers=("x", "y"),
            source="s",
            split="eval",
            supporting=(("p1", "p2"), ("p3",)),
        ),
    )
    assert [q.id for q in load_questions(path, split="train", limit=2)] == ["q0", "q2"]


BROKEN = [
    "{not json",
    '{"id": 1}',
    "[1]",
    "",
    '{"id": 1, "text": " ", "golden_answers": ["ab"]}',
    '{"id": 1, "text": "Who?", "golden_answers": []}',
    '{"id": 1, "text": "Who?", "golden_answers": "ab"}',
    '{"id": 1, "text": "Who?", "golden_answers": [3]}',
    '{"id": 1, "text": "Who?", "golden_answers": ["ab", "The"]}',
    '{"id": 1, "text": "\\ud800", "golden_answers": ["ab"]}',
    record(0),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_line_is_named(tmp_path, broken):
    with pytest.raises(DataError, match=r"q\.jsonl:2"):
        load_questions(write(tmp_path, [record(0), broken]))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = write(tmp_path, [record(0)])
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl:2"):
        load_questions(path)


def test_missing_file_and_empty_split_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl does not exist"):
        load_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        DataError, match=r"no question of split 'dev', found '\w*': name a split .* with --split dev"
    ):
        load_questions(write(tmp_path, [record(0)]), split="dev")


def stream(size=5, batch_size=3, seed=0, shuffle=True):
    questions = tuple(Question(id=str(i), text="?", golden_answers=("a",)) for i in range(size))
    return QuestionStream(questions=questions, batch_size=batch_size, seed=seed, shuffle=shuffle)


def ids(questions):
    return [q.id for q in questions]


def test_every_epoch_visits_every_question_once():
    seen = [i for step in range(5) for i in ids(stream().batch(step))]
    for epoch in range(3):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == ["0", "1", "2", "3", "4"]
    assert seen[:5] != seen[5:10]


def test_a_step_can_be_asked_for_alone():
    assert [ids(stream().batch(s)) for s in range(9)][7] == ids(stream().batch(7))
    assert ids(stream(seed=1).batch(0)) != ids(stream(seed=0).batch(0))
    assert ids(stream(shuffle=False).batch(1)) == ["3", "4", "0"]
