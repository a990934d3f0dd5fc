"""The gate with the real engine, environment and retriever; on an untrained model and on the committed start policy."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import pytest

from data_prep.coldstart import ColdstartConfig, build_tokenizer
from data_prep.index import IndexConfig, build_index
from data_prep.small_qwen import ModelShape, build_model
from data_prep.tokenizer import save_tokenizer
from data_prep.world import WorldConfig, build_world
from eval.gate import GateConfig, gate, main
from eval.lift import LiftConfig
from megatron_sd.config import ModelConfig, ProtocolConfig, RetrieverConfig, RewardConfig, RolloutConfig
from megatron_sd.errors import MegatronSdError

FITS = ["--rollout.max_rollout_tokens=640", "--rollout.max_turn_tokens=8"]  # the positions of the small model
LIMITS = RolloutConfig(
    questions_per_step=40, max_search_turns=4, max_turn_tokens=24, max_observation_tokens=48, max_rollout_tokens=640
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
    shape = ModelShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=1)
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
    arguments = [f"--model.path={tmp_path}", f"--retriever.corpus={world / 'corpus'}", f"--questions={config.questions}"]
    with pytest.raises(MegatronSdError, match="labels are not read"):
        main([*arguments, *FITS, "--model.dtype=float32", "--limit=2", "--protocol.preset=compact"])


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
