"""`sd-search recipe`: the stages one after the other, each once, with what they have in common."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from data_prep.world.world import WorldConfig
from launch import local, recipe
from launch.cli import main as command
from launch.programs import make_world
from launch.recipe import STAGES, Stage, merged, overrides, read_recipe
from megatron_sd.durable.directories import committed
from megatron_sd.errors import ConfigError
from megatron_sd.observability.metrics_log import read_metrics
from tests.nursery import start_forked

SMALL = """
output: OUT
seed: 3
model: {path: MODEL, dtype: float32}
questions: WORLD/questions.jsonl
retriever: {corpus: WORLD/corpus, top_k: 1}
protocol: {preset: compact}
rollout: {max_turn_tokens: 24, max_observation_tokens: 48, max_rollout_tokens: 640, questions_per_step: 10}
reward: {answer: em}
sample: {output: "{output}/sample", split: train, limit: 20, num_samples: 4}
select:
  rollouts: "{output}/sample"
  output: "{output}/episodes"
  selection: {block_format: outcome_first, validation_share: 0.2}
sft: {episodes: "{output}/episodes", run_dir: "{output}/sft", num_steps: 2, episodes_per_step: 4}
gate:
  model: {path: "{sft_model}"}
  output: "{output}/gate"
  limit: 2
  rollout: {group_size: 2}
  lift: {num_resamples: 10, variants: [linked, shuffled, wrong_question]}
train:
  run_dir: "{output}/train"
  num_steps: 2
  model: {path: "{sft_model}"}
  data: {train: "{output}/episodes/questions.jsonl"}
  rollout: {questions_per_step: 2, group_size: 3}
  policy_loss: {kl_weight: 0.0}
  distill: {alpha: {warmup_steps: 0}, measure_every: 0}
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_stages_run_once_and_the_same_command_goes_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local, "start_ranks", start_forked)
    make_world(WorldConfig(output=str(tmp_path / "world"), num_train_questions=30, num_eval_questions=5))
    model, output, path = files("data_prep") / "coldstart_model", tmp_path / "out", tmp_path / "own.yaml"
    path.write_text(
        SMALL.replace("OUT", str(output))
        .replace("MODEL", str(model))
        .replace("WORLD", str(tmp_path / "world"))
    )
    assert command(["recipe", str(path)]) == 1
    said = capfd.readouterr()
    assert "the gate is closed: " in said.err, "two questions tell nothing"
    assert not (output / "train").exists()
    warm = committed(output / "sft" / "checkpoints")[0] / "model"
    assert warm.parent.name == "step_00000002"

    ran, dies = [], [True]
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, Stage(record=stage.record, run=noted(name, stage.run, ran, dies)))
    assert command(["recipe", str(path), "--gate_may_be_closed"]) == 130
    assert ran == ["gate", "train"]
    dies.clear()
    assert command(["recipe", str(path), "--gate_may_be_closed"]) == 0
    assert ran == ["gate", "train", "train"]
    assert "3/5  sft: finished before" in capfd.readouterr().out
    steps = read_metrics(output / "train" / "metrics.jsonl")
    assert list(steps) == [1, 2] and steps[2]["distill/divergence_nats"] > 0
    config = yaml.safe_load((output / "stages" / "train.yaml").read_text())
    assert config["model"] == {"path": str(warm), "dtype": "float32"} and config["seed"] == 3
    assert config["rollout"]["max_turn_tokens"] == 24 and config["rollout"]["questions_per_step"] == 2
    before, after = (load_file(place / "model.safetensors") for place in (Path(str(model)), warm))
    assert any(not np.array_equal(before[name], after[name]) for name in before)

    ran.clear()
    assert command(["recipe", str(path), "--gate_may_be_closed"]) == 0
    assert ran == []
    assert command(["recipe", str(path), "--gate_may_be_closed", "--train.num_steps=3"]) == 0
    assert ran == ["train"] and list(read_metrics(output / "train" / "metrics.jsonl")) == [1, 2, 3], (
        "it goes on"
    )
    shutil.rmtree(output / "episodes")
    (output / "stages" / "select.done").unlink()
    ran.clear()
    assert command(["recipe", str(path), "--gate_may_be_closed", "--train.num_steps=3"]) == 0
    assert ran == ["select"], "and what comes after it was asked for in the same way"


def noted(name, run, ran, dies):
    def noting(own, path):
        ran.append(name)
        if dies and name == "train":
            raise KeyboardInterrupt
        run(own, path)

    return noting


@pytest.mark.parametrize("name", ["real-0.5b", "real-3b", "real-7b"])
def test_recipes_are_complete_and_their_stages_fit(name):
    own, stages = read_recipe(
        [name, "--model.path=/m", "--questions=/q", "--retriever.corpus=/c", "--output=/o"]
    )
    assert list(stages) == list(STAGES) and own.output == "/o"
    assert {json.dumps(stages[stage]["protocol"]) for stage in ("sample", "select", "gate", "train")} == {
        '{"preset": "few_shot", "chat_template": true}'
    }
    assert stages["sft"]["optimizer"]["schedule"] == "cosine" and "optimizer" not in stages["gate"]
    assert stages["sft"]["model"]["path"] == stages["sample"]["model"]["path"] == "/m"
    assert (
        stages["gate"]["lift"]["block_format"]
        == stages["train"]["distill"]["block_format"]
        == "outcome_first"
    )
    assert stages["select"]["selection"]["block_format"] == "outcome_first"
    longest = stages["train"]["rollout"]["max_rollout_tokens"]
    assert stages["select"]["selection"]["max_tokens"] > longest, "a block is longer than no block"
    if name == "real-7b":
        assert stages["train"]["rollout"]["vllm"] == {
            "placement": "colocated",
            "kv_cache_gib": 20,
            "tensor_parallel_size": 2,
        }
        assert stages["train"]["update"] == {
            "max_microbatch_tokens": 16384,
            "offload_optimizer": "cpu",
            "pack_sequences": False,
        }
        assert stages["sample"]["limit"] == 8000 and own.num_ranks == 8


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "recipe: found no name, expected one of real-0.5b, real-3b, real-7b"),
        (["real"], "recipe: found 'real', expected one of real-0.5b"),
        (["real-0.5b", "--modle.path=x"], "modle: unknown key of a recipe; did you mean model?"),
        (["real-0.5b", "--sft.num_epoch=3"], "sft: num_epoch: unknown key; did you mean num_epochs?"),
        (
            ["real-0.5b", "--protocol.preset=x"],
            "sample: protocol.preset: found 'x', expected one of search_r1, few_shot",
        ),
        (["real-0.5b", "--num-ranks=x"], "num_ranks: found 'x', expected int"),
        (["real-0.5b", "--num-ranks=0"], "num_ranks: found 0, expected 1 or more"),
        (["real-0.5b", "--train.num_steps=-1"], "train: num_steps: found -1, expected 0 or more"),
        (
            ["real-0.5b", "--train.update.pack_sequences=false"],
            "train: model.attention: found varlen without update.pack_sequences",
        ),
        (["real-0.5b", "--sft.eval.questions=q", "--sft.eval.limit=0"], "sft: eval.limit: found 0, expect"),
        (["real-0.5b", "--sft.eval.questions=q", "--sft.retriever.corpus=null"], "sft: retriever.corpus, "),
        (["real-0.5b", "--sft.eval.split=x"], "sft: missing from the configuration: eval.questions"),
        (["real-0.5b", "--sample=3"], "sample: found 3, expected a section"),
        (["real-0.5b", "x"], "found 'x' on the command line, expected --key value"),
    ],
)
def test_a_mistake_is_found_before_any_stage_runs(argv, said):
    with pytest.raises(ConfigError) as error:
        read_recipe(argv)
    assert str(error.value).startswith(said)


def test_sections_are_merged_and_values_replaced():
    below = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert merged(below, {"a": {"c": {"f": 3}}, "e": [3]}) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [3]}
    assert below == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert overrides(["--a.b", "1e-5", "--num-ranks", "2", "--c"]) == [
        ("a.b", 1e-5),
        ("num_ranks", 2),
        ("c", True),
    ]


def test_a_recipe_without_sft_names_no_model_of_it(tmp_path):
    own = recipe.RecipeConfig(output="runs/x")
    with pytest.raises(ConfigError, match="a recipe without a stage sft"):
        recipe.filled({"model": {"path": "{sft_model}"}}, own, {})
    assert recipe.filled({"output": "{output}/a", "b": [1, "{output}"]}, own, {}) == {
        "output": "runs/x/a",
        "b": [1, "runs/x"],
    }
