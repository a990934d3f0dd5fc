"""Question files and their order."""

import dataclasses
import json

import pytest

from megatron_sd.config import DataConfig, MixConfig
from megatron_sd.config.checks import settings_of_hops
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Question
from megatron_sd.search import questions
from megatron_sd.search.questions import (
    MixedStream,
    QuestionStream,
    check_hops,
    load_questions,
    training_stream,
)
from megatron_sd.training.state.identity import kind_of
from tests import builders


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


def write_set(path, prefix, count):
    lines = (
        json.dumps({"id": f"{prefix}{n}", "text": f"{prefix} {n}?", "golden_answers": ["ab"]})
        for n in range(count)
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def asked(data, steps, batch_size=8, seed=3):
    stream = training_stream(data, batch_size=batch_size, seed=seed)
    return [question.id for step in range(steps) for question in stream.batch(step)]


def test_sets_are_met_by_weight_each_in_its_own_order(tmp_path):
    first, second = write_set(tmp_path / "a.jsonl", "a", 50), write_set(tmp_path / "b.jsonl", "b", 20)
    alone = asked(DataConfig(train=first), 40)
    assert sorted(alone[:50]) == sorted(f"a{n}" for n in range(50))
    data = DataConfig(train=first, weight=3.0, mix={"b": MixConfig(train=second, weight=1.0)})
    found = asked(data, 100)
    own = [name for name in found if name.startswith("a")]
    assert own[:320] == alone, "the order of a set does not depend on what is mixed in"
    assert sorted(name for name in found if name.startswith("b"))[0] == "b0"
    assert len(own) / len(found) == pytest.approx(0.75, abs=0.04)
    assert found == asked(data, 100) and found != asked(data, 100, seed=4)
    # any step by itself, as a resumed run asks it
    stream = training_stream(data, batch_size=8, seed=3)
    assert [q.id for q in stream.batch(57)] == found[57 * 8 : 58 * 8]


def test_the_order_goes_on_over_what_is_drawn_at_a_time(tmp_path, monkeypatch):
    sets = [
        QuestionStream(questions=[f"{name}{n}" for n in range(5)], batch_size=1, seed=0, shuffle=False)
        for name in "ab"
    ]
    own = {"streams": sets, "weights": (1.0, 1.0), "batch_size": 4, "seed": 0}
    monkeypatch.setattr(questions, "_CHUNK", 6)
    questions._drawn.cache_clear()
    found = [name for step in range(9) for name in MixedStream(**own).batch(step)]
    questions._drawn.cache_clear()
    for name in "ab":
        mine = [item for item in found if item.startswith(name)]
        assert mine == [f"{name}{n % 5}" for n in range(len(mine))] and len(mine) > 6


def test_an_id_in_two_sets_is_refused(tmp_path):
    data = DataConfig(
        train=write_set(tmp_path / "a.jsonl", "a", 3),
        mix={"b": MixConfig(train=write_set(tmp_path / "b.jsonl", "a", 2))},
    )
    with pytest.raises(
        DataError, match="data.mix: id 'a0' stands in .*a.jsonl and in .*b.jsonl, expected it once"
    ):
        training_stream(data, batch_size=2, seed=0)


def test_questions_are_kept_by_the_pass_rate_of_an_evaluation(tmp_path):
    train, rates = write_set(tmp_path / "a.jsonl", "a", 5), tmp_path / "samples.jsonl"
    results = {"a0": [0.0, 0.0], "a1": [1.0, 0.0], "a2": [1.0, 1.0], "a3": [0.0, 1.0]}
    lines = [
        json.dumps(
            {"question_id": name, "samples": [{"figures": {"em": em}} for em in ems] + [{"figures": {}}]}
        )
        for name, ems in [("a0", [1.0, 0.0]), *results.items()]
    ]
    rates.write_text("\n".join(lines) + "\n")
    data = DataConfig(train=train, pass_rates=str(rates), pass_range=(0.1, 0.9), shuffle=False)
    assert asked(data, 1, batch_size=4) == ["a1", "a3", "a1", "a3"]
    with pytest.raises(
        DataError, match="0 of 5 questions of .*a.jsonl have a pass rate within 0.6 to 0.9 .4 have one."
    ):
        asked(dataclasses.replace(data, pass_range=(0.6, 0.9)), 1)
    rates.write_text("{}\n")
    with pytest.raises(DataError, match="samples.jsonl:1 is no line of an evaluation .KeyError"):
        asked(data, 1)
    with pytest.raises(DataError, match="data.pass_rates: found no file at none, expected the samples.jsonl"):
        asked(dataclasses.replace(data, pass_rates="none"), 1)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.mix={b: {train: x, weight: 0}}", "data.mix.b.weight: found 0.0, expected more than 0"),
        ("--data.mix={b: {weight: 1}}", "data.mix: missing from the configuration: train"),
        ("--data.mix={b: {train: x, wheight: 1}}", "data.mix: wheight: unknown key; did you mean weight?"),
        ("--data.mix=x", "data.mix: found 'x', expected names, each of a section with train, weight, split"),
        ("--data.weight=0", "data.weight: found 0.0, expected more than 0"),
        (
            "--data.pass_range=[0.2, 0.9]",
            "data.pass_range: found .* without data.pass_rates, expected the samples.jsonl",
        ),
        ("--data.pass_range=[0.9, 0.2]", "data.pass_range: found .*expected the lower share first"),
    ],
)
def test_a_mistake_in_a_mixture_is_told(option, words):
    with pytest.raises(ConfigError, match=words):
        load(["--run_dir=r", "--model.path=m", "--data.train=q", "--retriever.corpus=c", option])


def test_where_a_set_lies_is_no_identity_and_what_it_holds_is(tmp_path):
    assert kind_of("data.mix.b.train") == "knob" and kind_of("data.mix.b.weight") == "identity"
    assert kind_of("data.pass_rates") == "knob" and kind_of("data.pass_range") == "identity"


def test_settings_that_look_at_hops_need_questions_that_name_them(caplog):
    def stream(*supporting):
        asked = [builders.question(n, supporting=own) for n, own in enumerate(supporting)]
        return QuestionStream(questions=asked, batch_size=1, seed=0, shuffle=False)

    named, nameless = stream([["p1"]]), stream([], [])
    setting = ["distill.queries evidence"]
    check_hops(nameless, [])
    check_hops(named, setting)
    assert not caplog.records
    with pytest.raises(
        DataError, match=r"distill.queries evidence: 2 of 2 training questions name no supporting"
    ):
        check_hops(nameless, setting)
    check_hops(MixedStream(streams=[named, nameless], weights=(1.0, 1.0), batch_size=1, seed=0), setting)
    assert (
        "2 of 3 training questions name no supporting passages: distill.queries evidence does" in caplog.text
    )


def test_which_settings_look_at_hops():
    required = [f"--{key}=x" for key in ("run_dir", "model.path", "data.train", "retriever.corpus")]
    assert settings_of_hops(load(required)) == []
    assert settings_of_hops(
        load([*required, "--advantage.estimator=stepsearch", "--distill.queries=evidence"])
    ) == [
        "advantage.estimator stepsearch",
        "distill.queries evidence",
    ]
