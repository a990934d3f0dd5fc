"""The evaluation that `sd-search sft` may have: when it looks, what at, and that nothing is trained by it."""

import dataclasses
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from launch import local
from launch.cli import main as command_line_of
from megatron_sd.building.sft import Evaluation, measured, other_keys
from megatron_sd.errors import ConfigError
from megatron_sd.rollout.stored import read_record
from megatron_sd.sft_config import load
from megatron_sd.trainer import Schedule
from megatron_sd.training.publisher import SparePublisher
from tests.whole_runs.runs import parameters, run, start, without_clocks
from tests.whole_runs.sft_runs import (
    LAST,
    NUM_STEPS,
    SFT,
    START_POLICY,
    arguments,
    figures,
    looking,
    make_episodes,
    wait_for_step,
)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return make_episodes(tmp_path_factory.mktemp("sft"))


def is_rollout_figure(name: str) -> bool:
    return name.startswith("eval/") and name != "eval/loss_nats"


@pytest.mark.slow
def test_rollouts_are_looked_at_first_every_so_often_and_last_and_change_nothing(episodes, tmp_path):
    """Through a kill and a resume, too: parameters and metrics are those of the run that nobody looked at."""
    straight = tmp_path / "straight"
    run(1, arguments(episodes, straight), SFT)
    argv = arguments(episodes, tmp_path / "run", "--checkpoint.every=2", *looking(episodes))
    ranks = start(1, argv, SFT)
    wait_for_step(3, tmp_path / "run")
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    said = run(1, argv, SFT)
    assert "resumed from" in said and "protocol." not in said
    steps = without_clocks(tmp_path / "run")
    looks = {
        step: {n: v for n, v in metrics.items() if is_rollout_figure(n)} for step, metrics in steps.items()
    }
    assert [step for step, own in looks.items() if own] == [0, 3, 4]
    rest = {
        step: {n: v for n, v in metrics.items() if not is_rollout_figure(n)}
        for step, metrics in steps.items()
    }
    assert rest == without_clocks(straight)
    expected, found = parameters(straight, LAST), parameters(tmp_path / "run", LAST)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    for step, model in ((0, START_POLICY), (NUM_STEPS, tmp_path / "run" / "checkpoints" / LAST / "model")):
        one = figures(episodes, model, tmp_path / f"eval{step}")
        assert {name: looks[step][name] for name in one} == pytest.approx(one), step
    line = next(line for line in said.splitlines() if line.startswith("step 4/4") and "eval em" in line)
    assert all(label in line for label in ("eval form", "eval searches", "eval loss"))


def test_evaluations_are_measured_when_each_is_due():
    def of(name: str, every: int) -> Evaluation:
        return Evaluation(every=every, num_steps=10, measure=lambda step: {name: float(step)})

    due = {step: set(measured([of("a", 0), of("b", 4)], step)) for step in range(11)}
    assert {step: names for step, names in due.items() if names} == {
        0: {"a", "b"},
        4: {"b"},
        8: {"b"},
        10: {"a", "b"},
    }
    schedule = Schedule(
        num_steps=10, eval_every=(0, 4), transcripts_every=0, checkpoint_every=0, evaluates_at_end=True
    )
    assert [step for step in range(1, 11) if schedule.evaluation_is_due(step)] == [4, 8, 10], (
        "the loop asks at the same steps"
    )


def test_weights_are_published_for_an_evaluation_alone():
    published = []
    inner = SimpleNamespace(
        publish=lambda policy, engine, version: published.append(version),
        metrics=lambda: {"publish/sent_mib": float(published[-1])},
    )
    publisher = SparePublisher(inner, Evaluation(every=4, num_steps=10, measure=dict).is_due)
    for version in range(11):
        publisher.publish(None, None, version)
        is_due = published[-1] == version
        assert publisher.metrics() == ({"publish/sent_mib": float(version)} if is_due else {})
    assert published == [0, 4, 8, 10]


def test_an_evaluation_is_no_part_of_what_is_trained(episodes, tmp_path):
    """So it may be another one, or none, when a run goes on: checkpoints compare this configuration."""
    without, looked_at = (load(arguments(episodes, tmp_path, *more)) for more in ((), looking(episodes)))
    assert without[1] == looked_at[1] and without[0] != looked_at[0]


def test_a_protocol_that_the_episodes_do_not_have_is_told(episodes, tmp_path):
    record = read_record(episodes / "episodes.json", "")
    same, other = (
        load(arguments(episodes, tmp_path, *looking(episodes), *more))[0]
        for more in ((), ("--protocol.preset=search_r1", '--protocol.search_tags=["<s>", "</s>"]'))
    )
    assert other_keys(same, record) == [] and other_keys(other, record) == ["preset", "search_tags"]
    assert other_keys(dataclasses.replace(other, eval=None), record) == []


@pytest.mark.parametrize(
    ("left_out", "more", "said"),
    [
        (
            "--protocol",
            (),
            "eval: found it without protocol, expected the sections retriever, protocol, rollout beside it",
        ),
        ("--r", (), "eval: found it without retriever, rollout, expected"),
        (
            "--retriever.corpus",
            (),
            "retriever.corpus, .endpoints, .qdrant, .opensearch, .web, .function: found none, expected one",
        ),
        (
            "--eval.questions",
            (),
            "missing from the configuration: eval.questions; set it in the YAML file or as --eval.quest",
        ),
        ("none", ("--eval.limit=0",), "eval.limit: found 0, expected 1 or more"),
        ("none", ("--eval.every=-1",), "eval.every: found -1, expected 0 or more"),
        ("none", ("--eval.evry=2",), "eval.evry: unknown key; did you mean eval.every?"),
        (
            "none",
            ("--protocol.preset=compac",),
            "protocol.preset: found 'compac', expected one of search_r1, few_shot",
        ),
        ("none", ("--rollout.group_size=0",), "rollout.group_size: found 0, expected 1 or more"),
        (
            "none",
            ("--update.tensor_parallel_size=2", "--rollout.engine=vllm"),
            "rollout.vllm.publish: found auto with update.tensor_parallel_size above 1, expected gather",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_by_name(episodes, tmp_path, left_out, more, said):
    argv = [
        word
        for word in arguments(episodes, tmp_path, *looking(episodes), *more)
        if not own_option(word, left_out)
    ]
    with pytest.raises(ConfigError) as error:
        load(argv)
    assert str(error.value).startswith(said)


def own_option(word: str, left_out: str) -> bool:
    """--run_dir is no option of the evaluation."""
    return word.startswith(left_out) and not word.startswith("--run_dir")


@pytest.mark.slow
def test_what_an_evaluation_takes_and_reads_is_looked_at_first(episodes, tmp_path, capfd, monkeypatch):
    argv = arguments(episodes, tmp_path / "run", "--safety.check_memory=refuse", *looking(episodes))
    monkeypatch.setattr(local, "free_bytes", lambda: 1 << 20)
    assert command_line_of(["sft", *argv, "--rollout.max_rollout_tokens=4000000"]) == 2
    assert "at the worst moment (rollout)" in capfd.readouterr().err, (
        "keys and values of the evaluation's rollouts"
    )
    monkeypatch.setattr(local, "free_bytes", lambda: None)
    assert command_line_of(["sft", *argv, "--eval.questions=nowhere.jsonl"]) == 1
    assert "questions file nowhere.jsonl does not exist" in capfd.readouterr().err
