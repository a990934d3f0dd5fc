"""The gate with the real engine, environment and retriever; on an untrained model and on the committed
start policy."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest

from data_prep.passages.index import IndexConfig, build_index
from data_prep.world.coldstart import ColdstartConfig, build_tokenizer
from data_prep.world.small_qwen import SmallQwenShape, build_model
from data_prep.world.tokenizer import save_tokenizer
from data_prep.world.world import WorldConfig, build_world
from eval.gate.command import GateConfig, gate, main
from eval.gate.lift import LiftConfig
from eval.report import ReportConfig, make_report
from eval.samples import read_lines
from launch.local import gate as gate_on_ranks
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.errors import ConfigError, MegatronSdError
from megatron_sd.rollout.rollouter import Rollouter

FITS = ["--rollout.max_rollout_tokens=640", "--rollout.max_turn_tokens=8"]  # the positions of the small model
LIMITS = RolloutConfig(
    questions_per_step=40,
    max_search_turns=4,
    max_turn_tokens=24,
    max_observation_tokens=48,
    max_rollout_tokens=640,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world")
    build_world(WorldConfig(output=str(output), seed=11))
    paths = {"passages": str(output / "passages.jsonl"), "output": str(output / "corpus")}
    build_index(IndexConfig(**paths, stop_words="none", stemmer="none"))
    return output


def config_for(model: Path, world: Path) -> GateConfig:
    return GateConfig(
        model=ModelConfig(path=str(model), dtype="float32"),
        retriever=RetrieverConfig(corpus=str(world / "corpus"), top_k=1),
        questions=str(world / "questions.jsonl"),
        limit=8,
        protocol=ProtocolConfig(preset="compact"),
        rollout=LIMITS,
        reward=RewardConfig(answer="em"),
        lift=LiftConfig(correct_above=0.5, num_resamples=500),
    )


def test_an_untrained_model_asks_nothing_and_the_gate_stays_closed(world, tmp_path):
    tokenizer = build_tokenizer(ColdstartConfig())
    shape = SmallQwenShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=1)
    build_model(shape, vocab_size=len(tokenizer), seed=0).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    record = tmp_path / "coldstart.json"
    record.write_text('{"step": 3}', encoding="utf-8")
    config = dataclasses.replace(config_for(tmp_path, world), record=str(record))
    report = gate(config)
    assert report.success == 0
    assert report.overall["linked"].num_questions == 0, "no rollout searched, so there is no block to show"
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["step"] == 3
    assert written["gate"]["gate"] == "closed"
    assert written["gate"]["world"]["seed"] == 11
    assert written["gate"]["overall"]["linked"]["mean"] is None
    arguments = [
        f"--model.path={tmp_path}",
        f"--retriever.corpus={world / 'corpus'}",
        f"--questions={config.questions}",
    ]
    with pytest.raises(MegatronSdError, match="labels are not read"):
        main([*arguments, *FITS, "--model.dtype=float32", "--limit=2", "--protocol.preset=compact"])
    with pytest.raises(ConfigError, match="lift.num_resamples: found 0, expected 1 or more"):
        main([*arguments, *FITS, "--lift.num_resamples=0"])


@pytest.mark.slow
def test_a_killed_gate_goes_on_and_reports_the_same(world, tmp_path, monkeypatch):
    model = Path(str(files("data_prep") / "coldstart_model"))
    rollout = dataclasses.replace(LIMITS, questions_per_step=3, group_size=3)
    config = dataclasses.replace(config_for(model, world), limit=6, rollout=rollout)
    straight = gate(dataclasses.replace(config, output=str(tmp_path / "straight")))
    asked = []
    run = Rollouter.run

    def dies_at_the_fourth(self, questions, **options):
        asked.append((options["step"], [question.id for question in questions]))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run(self, questions, **options)

    monkeypatch.setattr(Rollouter, "run", dies_at_the_fourth)
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        gate(config)
    assert gate(config).lines() == straight.lines()
    assert asked[3] == asked[4] and [draw for draw, _ in asked[:5]] == [0, 0, 1, 1, 1]
    one, other = ((tmp_path / name / "gate.json").read_text() for name in ("straight", "out"))
    assert one == other and json.loads(one)["success"] == round(straight.success, 4)
    one, other = (read_lines(tmp_path / name / "transcripts" / "gate.jsonl") for name in ("straight", "out"))
    assert one == other and [len(record["rollouts"]) for record in one] == [3] * 6
    assert [record["question"]["id"] for record in one] == [name for _, names in asked[:2] for name in names]
    assert all(
        rollout["hindsight"] == "" and rollout["scores"] for record in one for rollout in record["rollouts"]
    )
    page = make_report(ReportConfig(run_dir=str(tmp_path / "out")))
    assert one[0]["question"]["text"] in page.read_text(encoding="utf-8")
    count = len(asked)
    assert gate(config).lines() == straight.lines() and len(asked) == count, "nothing is left to sample"
    with pytest.raises(ConfigError, match="holds an evaluation whose temperature is 1.0, now it is 0.5"):
        gate(dataclasses.replace(config, rollout=dataclasses.replace(rollout, temperature=0.5)))


@pytest.mark.slow
@pytest.mark.ranks
def test_a_gate_on_two_ranks_samples_what_one_does(world, tmp_path):
    """Each rank a share of the questions; a rollout's noise follows from its question, wherever it is
    sampled."""
    model = Path(str(files("data_prep") / "coldstart_model"))
    rollout = dataclasses.replace(LIMITS, questions_per_step=4, group_size=2)
    config = dataclasses.replace(
        config_for(model, world), limit=4, rollout=rollout, output=str(tmp_path / "one")
    )
    gate(dataclasses.replace(config, lift=LiftConfig(correct_above=0.5, num_resamples=50)))
    names = ("questions_per_step", "group_size", "max_search_turns", "max_turn_tokens", "max_rollout_tokens")
    limits = {name: getattr(rollout, name) for name in names} | {"max_observation_tokens": 48}
    options = {
        "model.path": model, "model.dtype": "float32", "retriever.corpus": world / "corpus", "retriever.top_k": 1,
        "questions": world / "questions.jsonl", "limit": 4, "protocol.preset": "compact", "reward.answer": "em",
        "lift.correct_above": 0.5, "lift.num_resamples": 50, "output": tmp_path / "two",
        **{f"rollout.{name}": value for name, value in limits.items()},
    }  # fmt: skip
    # a gate of four questions is closed
    with pytest.raises(MegatronSdError, match="eval.gate.command ended with exit code"):
        gate_on_ranks(["--num-ranks=2", *(f"--{name}={value}" for name, value in options.items())])
    one, two = (read_lines(tmp_path / name / "draws.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 7
    assert [line["questions"] for line in one] == [line["questions"] for line in two]
    sampled = [
        [turn["completion_ids"] for group in line["groups"] for rollout in group for turn in rollout["turns"]]
        for line in (one[0], two[0])
    ]
    assert sampled[0] == sampled[1]


@pytest.mark.slow
def test_the_committed_start_policy_reads_labels_in_a_world_it_never_saw(world):
    model = Path(str(files("data_prep") / "coldstart_model"))
    report = gate(dataclasses.replace(config_for(model, world), limit=80))
    assert 0.2 < report.success < 0.6
    assert report.mixed["linked"].low > 0.15
    assert report.mixed["only_correct"].low > 0.2
    assert report.linked_minus_shuffled.low > 0.05
    recorded = json.loads((model / "coldstart.json").read_text(encoding="utf-8"))["gate"]
    assert recorded["gate"] == "passed"
    assert recorded["linked_minus_shuffled"]["low"] > 0
    assert report.overall["wrong_question"].low <= 0
