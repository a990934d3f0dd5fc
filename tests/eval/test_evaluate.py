"""`sd-search eval` and `sd-search compare` with the committed small model: strategies, resuming, kills, and
input that is bad."""

import asyncio
import dataclasses
import json
import signal
import time
from importlib.resources import files
from pathlib import Path

import pytest

from data_prep.world.world import WorldConfig
from eval.compare import ALL, CompareConfig, compare
from eval.run import EvalConfig, evaluate
from eval.samples import read_lines, read_results
from eval.strategies.table import PROMPTED
from launch.cli import main as command
from launch.programs import make_world
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RolloutConfig
from megatron_sd.durable.files import append_lines, cut_torn_line
from megatron_sd.errors import ConfigError, DataError, RolloutError
from megatron_sd.records import RolloutGroup, StopReason
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.search.questions import load_questions
from tests import builders
from tests.nursery import nursery

LIMITS = RolloutConfig(
    questions_per_step=3,
    max_search_turns=4,
    max_turn_tokens=24,
    max_observation_tokens=48,
    max_rollout_tokens=640,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("eval") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=30, num_eval_questions=12))
    return output


def config_for(world: Path, output: Path, **changes) -> EvalConfig:
    config = EvalConfig(
        model=ModelConfig(path=str(files("data_prep") / "coldstart_model"), dtype="float32"),
        retriever=RetrieverConfig(corpus=str(world / "corpus"), top_k=1),
        questions=str(world / "questions.jsonl"),
        split="eval",
        limit=6,
        num_resamples=100,
        output=str(output),
        protocol=ProtocolConfig(preset="compact"),
        rollout=LIMITS,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def agent(world, tmp_path_factory):
    """A finished evaluation of the agent."""
    output = tmp_path_factory.mktemp("runs") / "agent"
    evaluate(config_for(world, output, train_questions=str(world / "questions.jsonl"), train_split="eval"))
    return output


def reports(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in ("report.json", "report.md")]


def test_the_agent_answers_and_the_report_says_how(agent, world):
    report = json.loads((agent / "report.json").read_text())
    figures = report["averages"]["questions"]
    assert figures["searches"]["value"] > 1
    assert figures["answer_in_passages"]["value"] > 0
    assert figures["format_valid"]["value"] > 0.5
    assert figures["infrastructure_error"]["value"] == 0.0
    assert sum(own["num_questions"] for own in report["sets"].values()) == report["num_questions"] == 6
    assert (
        report["corpus_version"]
        == open_retriever(RetrieverConfig(corpus=str(world / "corpus"))).corpus_version
    )
    assert report["overlap"]["num_shared"] == 6, "it was given its own questions as training questions"
    assert "6 of these questions are training questions too" in (agent / "report.md").read_text()
    assert len(read_lines(agent / "transcripts/evaluation.jsonl")) == 6


@pytest.mark.parametrize("strategy", sorted(PROMPTED))
def test_every_strategy_runs_with_the_small_model(strategy, world, tmp_path):
    limits = dataclasses.replace(LIMITS, max_search_turns=1, max_turn_tokens=12)
    report = evaluate(config_for(world, tmp_path, strategy=strategy, limit=2, rollout=limits))
    figures = report["averages"]["questions"]
    assert figures["infrastructure_error"]["value"] == 0.0
    assert 1 <= figures["turns"]["value"] <= 4
    assert (strategy in ("rag", "ircot", "thinker")) == (figures["searches"]["value"] == 1.0)


def test_rag_reads_what_the_retriever_finds(world, tmp_path):
    config = config_for(world, tmp_path, strategy="rag")
    evaluate(config)
    questions = load_questions(config.questions, "eval", 6)
    corpus = open_retriever(config.retriever)

    async def search():
        return await corpus.search([question.text for question in questions], 1)

    expected = asyncio.run(search())
    results = read_results(tmp_path / "samples.jsonl")
    for question, hits in zip(questions, expected):
        (sample,) = results[question.id].samples
        assert sample.retrieved == (tuple(hit.passage.id for hit in hits),)
        found = {hit.passage.id for hit in hits}
        assert sample.figures["supporting_recall"] == sum(
            bool(found & set(hop)) for hop in question.supporting
        ) / len(question.supporting)


def test_a_second_run_changes_nothing_and_a_missing_or_torn_line_is_made_again(agent, world, tmp_path):
    config = config_for(world, tmp_path, train_questions=str(world / "questions.jsonl"), train_split="eval")
    whole = reports(agent)
    lines = (agent / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    evaluate(config)
    assert reports(tmp_path) == whole
    assert sorted((tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)
    evaluate(config)
    assert reports(tmp_path) == whole
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 6


def test_failed_questions_alone_are_run_again(agent, world, tmp_path):
    records = read_lines(agent / "samples.jsonl")
    failed = json.loads(json.dumps(records[4]))
    failed["samples"][0] |= {"stop_reason": "retrieval_failed", "answer": None, "figures": {}}
    append_lines(tmp_path / "samples.jsonl", [*records[:4], failed, records[5]])
    evaluate(config_for(world, tmp_path))
    written = read_lines(tmp_path / "samples.jsonl")
    assert len(written) == 7
    assert written[6]["question_id"] == failed["question_id"]
    assert json.loads((tmp_path / "report.json").read_text())["num_failed"] == 0


def test_too_many_failures_end_the_evaluation_and_keep_what_was_answered(world, tmp_path, monkeypatch):
    class HalfBroken:
        def run(self, questions, *, step, greedy):
            reasons = [StopReason.RETRIEVAL_FAILED, StopReason.ANSWERED]
            rollouts = [
                builders.rollout(stop_reason=reasons[n % 2], answer="x") for n in range(len(questions))
            ]
            return [
                RolloutGroup(question=question, rollouts=(own,)) for question, own in zip(questions, rollouts)
            ]

    monkeypatch.setattr("eval.run.build_strategy", lambda *_, **__: HalfBroken())
    with pytest.raises(
        RolloutError, match=r"2 of 3 rollouts failed \({'retrieval_failed': 2}\), expected at most 20%"
    ):
        evaluate(config_for(world, tmp_path))
    assert [result.failed for result in read_results(tmp_path / "samples.jsonl").values()] == [
        True,
        False,
        True,
    ]
    assert not (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_killed_at_random_and_resumed_it_reports_the_same(agent, world, tmp_path):
    arguments = [
        *(
            f"--model.path={files('data_prep') / 'coldstart_model'}",
            "--model.dtype=float32",
            "--retriever.top_k=1",
        ),
        *(
            f"--retriever.corpus={world / 'corpus'}",
            f"--questions={world / 'questions.jsonl'}",
            "--split=eval",
            "--limit=6",
        ),
        *(
            "--num_resamples=100",
            f"--output={tmp_path}",
            "--protocol.preset=compact",
            "--rollout.questions_per_step=3",
        ),
        *(
            "--rollout.max_search_turns=4",
            "--rollout.max_turn_tokens=24",
            "--rollout.max_observation_tokens=48",
        ),
        *(
            "--rollout.max_rollout_tokens=640",
            f"--train_questions={world / 'questions.jsonl'}",
            "--train_split=eval",
        ),
    ]
    program = {"call": "launch.cli:main", "argument": ["eval", *arguments], "ranks": 1}
    for num_lines in (0, 3):  # killed while the first slice runs, and as soon as it stands
        running = nursery().start(**program)
        samples, started = tmp_path / "samples.jsonl", tmp_path / "evaluation.json"
        deadline = time.monotonic() + 300
        while running.code(0, 0) is None and time.monotonic() < deadline:
            if num_lines == 0 and started.exists():
                break
            if num_lines and samples.exists() and len(samples.read_bytes().splitlines()) >= num_lines:
                break
            time.sleep(0.01)
        running.signal(signal.SIGKILL)
        running.wait()
    nursery().start(**program).succeed()
    assert reports(tmp_path) == reports(agent)


def test_samples_are_drawn_for_pass_at_k(world, tmp_path):
    report = evaluate(config_for(world, tmp_path, num_samples=3, limit=4))
    figures = report["averages"]["questions"]
    assert [name for name in figures if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@3"]
    assert figures["pass@1"]["value"] == pytest.approx(figures["em"]["value"])
    assert all(len(result.samples) == 3 for result in read_results(tmp_path / "samples.jsonl").values())


def test_another_configuration_does_not_go_on_in_the_same_directory(agent, world):
    with pytest.raises(ConfigError, match="holds an evaluation whose top_k is 1, now it is 2"):
        evaluate(config_for(world, agent, retriever=RetrieverConfig(corpus=str(world / "corpus"), top_k=2)))


def test_damaged_samples_name_their_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"question_id": "a"}\n{"ques\n{}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:2 is no JSON object"):
        read_lines(path)
    path.write_text('{"question_id": "a"}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:1 is no line of an evaluation"):
        read_results(path)
    path.write_text('{"a": 1}\n{"b"')
    assert read_lines(path) == [{"a": 1}]
    cut_torn_line(path)
    assert path.read_text() == '{"a": 1}\n'
    assert read_results(tmp_path / "none.jsonl") == {}


BAD_QUESTIONS = {
    "no golden answers": '{"id": "a", "text": "Who?", "golden_answers": []}\n',
    "id 'a' repeats that of line 1": '{"id": "a", "text": "Who?", "golden_answers": ["x"]}\n' * 2,
    "not a question record": '{"id": "a", "text": "Who?", "golden_answers": ["x"]}\n{"id": "b", "te',
}


@pytest.mark.parametrize("message", BAD_QUESTIONS)
def test_questions_that_cannot_be_scored_are_refused(message, world, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(BAD_QUESTIONS[message])
    with pytest.raises(DataError, match=message):
        evaluate(config_for(world, tmp_path / "run", questions=str(path), split=None))


def test_a_directory_that_is_no_causal_language_model_is_refused(world, tmp_path):
    model = tmp_path / "encoder"
    model.mkdir()
    config = config_for(world, tmp_path / "run", model=ModelConfig(path=str(model), dtype="float32"))
    with pytest.raises(DataError, match="found no config.json"):
        evaluate(config)
    (model / "config.json").write_text('{"archi')
    with pytest.raises(DataError, match="config.json is no JSON object"):
        evaluate(config)
    (model / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(DataError, match="BertModel, which is no causal language model"):
        evaluate(config)


def changed(agent: Path, output: Path, wrong: int) -> Path:
    """A copy of an evaluation in which the first questions are answered right, and the next `wrong` ones
    wrong."""
    output.mkdir()
    (output / "evaluation.json").write_bytes((agent / "evaluation.json").read_bytes())
    records = read_lines(agent / "samples.jsonl")
    for place, record in enumerate(records):
        record["samples"][0]["figures"]["em"] = float(place >= wrong)
    append_lines(output / "samples.jsonl", records)
    return output


def test_compare_pairs_the_questions(agent, tmp_path, capsys):
    first, second = changed(agent, tmp_path / "a", wrong=5), changed(agent, tmp_path / "b", wrong=0)
    own = compare(CompareConfig(first=str(first), second=str(second), num_resamples=200))[ALL]
    assert (own.num_questions, own.first, own.second) == (6, pytest.approx(1 / 6), 1.0)
    assert own.difference.value == pytest.approx(5 / 6)
    assert own.p_value == pytest.approx(2 / 2**5), "five questions only the second run got right"
    output = tmp_path / "figures.json"
    assert command(["compare", str(first), str(second), f"--output={output}", "--num_resamples=200"]) == 0
    assert "+0.833" in capsys.readouterr().out
    assert json.loads(output.read_text())[ALL]["p_holm"] is None


def test_compare_adjusts_over_sets(agent, tmp_path):
    first, second = changed(agent, tmp_path / "a", wrong=5), changed(agent, tmp_path / "b", wrong=0)
    found = compare(CompareConfig(first=str(first), second=str(second), num_resamples=200))
    sets = [own for name, own in found.items() if name != ALL]
    assert sum(own.num_questions for own in sets) == 6
    smallest = min(sets, key=lambda own: own.p_value)
    assert smallest.p_holm == pytest.approx(min(1.0, len(sets) * smallest.p_value))


@pytest.mark.parametrize(
    ("key", "meaning"), [("questions_version", "questions"), ("corpus_version", "corpus")]
)
def test_compare_refuses_runs_over_different_things(key, meaning, agent, tmp_path):
    other = changed(agent, tmp_path / "b", wrong=0)
    identity = json.loads((other / "evaluation.json").read_text()) | {key: "other"}
    (other / "evaluation.json").write_text(json.dumps(identity))
    with pytest.raises(DataError, match=f"over different {meaning}"):
        compare(CompareConfig(first=str(agent), second=str(other)))


def test_compare_refuses_a_run_that_is_not_finished(agent, tmp_path):
    other = changed(agent, tmp_path / "b", wrong=0)
    lines = (other / "samples.jsonl").read_text().splitlines(keepends=True)
    (other / "samples.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="is not finished: 1 questions unanswered, 0 failed"):
        compare(CompareConfig(first=str(agent), second=str(other)))
    with pytest.raises(DataError, match="is no evaluation"):
        compare(CompareConfig(first=str(agent), second=str(tmp_path)))
