"""`sd-search sft`: the trainer's loop on stored episodes, through the real door."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from data_prep.world.tokenizer import save_tokenizer, train_tokenizer
from launch import local
from launch.cli import main as command_line_of
from megatron_sd.observability.metrics_log import read_metrics
from megatron_sd.rollout.stored import StoredGroups
from megatron_sd.sft_config import load
from tests.training.same_steps import assert_same_moments, assert_same_movement, saved_moments
from tests.whole_runs.runs import parameters, run, start, without_clocks
from tests.whole_runs.sft_runs import (
    LAST,
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


@pytest.fixture(scope="module")
def straight(episodes, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    run(1, arguments(episodes, run_dir), SFT)
    return run_dir


def nats_a_token(model_path: Path, groups) -> float:
    """Of what was sampled, by transformers alone, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    terms = []
    for group in groups:
        (own,) = group.rollouts
        ids, sampled = list(own.prompt_ids), []
        for turn in own.turns:
            sampled += range(len(ids), len(ids) + len(turn.completion_ids))
            ids += [*turn.completion_ids, *turn.observation_ids]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        terms += [-log_probs[place - 1, ids[place]].item() for place in sampled]
    return sum(terms) / len(terms)


@pytest.mark.slow
def test_the_losses_are_nats_a_sampled_token_and_fall(episodes, straight):
    steps = without_clocks(straight)
    assert list(steps) == [0, 1, 2, 3, 4]
    held_out = list(StoredGroups(episodes / "validation.jsonl"))
    losses = {
        step: metrics["eval/loss_nats"] for step, metrics in steps.items() if "eval/loss_nats" in metrics
    }
    assert list(losses) == [0, 2, 4]
    assert losses[0] == pytest.approx(nats_a_token(START_POLICY, held_out), rel=1e-5)
    trained = straight / "checkpoints" / LAST / "model"
    assert losses[4] == pytest.approx(nats_a_token(trained, held_out), rel=1e-4)
    learnt = list(StoredGroups(episodes / "train.jsonl"))
    assert nats_a_token(trained, learnt) < 0.95 * nats_a_token(START_POLICY, learnt)
    lines = (straight / "transcripts" / "step_00000002.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["question"]["text"].startswith("Who")
    rates = [metrics["optim/learning_rate"] for step, metrics in steps.items() if step]
    assert rates == pytest.approx([2e-3, 1.55e-3, 0.65e-3, 0.2e-3]), "1, 3/4, 1/4, 0 above the floor"
    assert all(
        metrics["loss/clipped_share"] == 0 and metrics["loss/kl"] == 0
        for step, metrics in steps.items()
        if step
    )


@pytest.mark.slow
def test_the_first_steps_loss_is_that_of_its_episodes(episodes, straight):
    """One step over the whole file, which is every episode once: no token of prompt, block or environment
    is in it."""
    groups = list(StoredGroups(episodes / "train.jsonl"))
    run_dir = straight / "whole"
    nobody_looks = ("--log.eval_every=0", "--retriever.corpus=nowhere", "--rollout.engine=vllm")
    size = ("--num_steps=1", f"--episodes_per_step={len(groups)}")
    run(1, arguments(episodes, run_dir, *size, *nobody_looks), SFT)
    assert list(read_metrics(run_dir / "metrics.jsonl")) == [1], "without eval its sections are not looked at"
    found = read_metrics(run_dir / "metrics.jsonl")[1]["loss/policy"]
    assert found == pytest.approx(nats_a_token(START_POLICY, groups), rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(episodes, straight, tmp_path):
    argv = arguments(episodes, tmp_path, "--checkpoint.every=2")
    ranks = start(1, argv, SFT)
    wait_for_step(3, tmp_path)
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert not (tmp_path / "checkpoints" / LAST).exists()
    assert "resumed from" in run(1, argv, SFT)
    expected, found = parameters(straight, LAST), parameters(tmp_path, LAST)
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.array_equal(expected[name], found[name]), name
    assert without_clocks(tmp_path) == without_clocks(straight)
    longer = start(1, [*argv, "--num_steps=9"], SFT)
    assert longer.wait() == [1]
    assert "has another plan: num_steps was 4 and is now 9; restore it, or go on" in longer.output()


@pytest.mark.slow
def test_looking_at_what_is_held_out_changes_nothing(episodes, straight, tmp_path):
    run(1, arguments(episodes, tmp_path, "--log.eval_every=0"), SFT)
    expected, found = parameters(straight, LAST), parameters(tmp_path, LAST)
    for name in expected:
        assert np.array_equal(expected[name], found[name]), name
    assert not any("eval/loss_nats" in metrics for metrics in without_clocks(tmp_path).values())


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("sharing", [(), ("--update.tensor_parallel_size=2",)])
def test_two_ranks_equal_one(episodes, straight, tmp_path, sharing):
    run(2, arguments(episodes, tmp_path, *sharing, *looking(episodes)), SFT)
    expected, found, began = (
        {name: torch.from_numpy(array) for name, array in arrays.items()}
        for arrays in (
            parameters(straight, LAST),
            parameters(tmp_path, LAST),
            load_file(START_POLICY / "model.safetensors"),
        )
    )
    assert_same_movement(found, expected, began)
    if not sharing:
        assert_same_moments(
            *(
                saved_moments(directory / "checkpoints" / LAST / "shards")
                for directory in (tmp_path, straight)
            )
        )
    one, two = without_clocks(straight), without_clocks(tmp_path)
    assert one.keys() == two.keys()
    looked = figures(episodes, START_POLICY, tmp_path / "eval")
    assert {name: two[0][name] for name in looked} == pytest.approx(looked)
    assert [step for step in two if "eval/reward/em" in two[step]] == [0, 3, 4]
    for step in one:
        for name in {"loss/policy", "eval/loss_nats"} & one[step].keys():
            assert two[step][name] == pytest.approx(one[step][name], abs=2e-5, rel=1e-3), (step, name)


@pytest.mark.slow
def test_adapters_are_merged_into_the_model_that_is_left(episodes, tmp_path, capsys):
    options = ("--model.lora.rank=4", "--num_epochs=0.5", "--update.pack_sequences=true")
    argv = arguments(episodes, tmp_path, *options, *looking(episodes), "--eval.every=0")
    argv = [word for word in argv if not word.startswith("--num_steps")]
    num_steps = load(argv)[1].num_steps
    assert num_steps == -(-len(StoredGroups(episodes / "train.jsonl")) // 12)
    assert command_line_of(["sft", *argv]) == 0
    model = tmp_path / "checkpoints" / f"step_{num_steps:08}" / "model"
    assert capsys.readouterr().out.splitlines()[-1] == f"model {model}"
    before, after = load_file(START_POLICY / "model.safetensors"), load_file(model / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved)
    held_out = list(StoredGroups(episodes / "validation.jsonl"))
    losses = [
        metrics["eval/loss_nats"]
        for metrics in without_clocks(tmp_path).values()
        if "eval/loss_nats" in metrics
    ]
    assert losses[-1] == pytest.approx(nats_a_token(model, held_out), rel=1e-4)
    looks = {step: own for step, own in without_clocks(tmp_path).items() if "eval/reward/em" in own}
    one = figures(episodes, model, tmp_path / "eval")
    assert list(looks) == [0, num_steps]
    assert {name: looks[num_steps][name] for name in one} == pytest.approx(one)


def test_errors_of_a_run_are_one_line(episodes, tmp_path, capfd, monkeypatch):
    save_tokenizer(train_tokenizer(["another text"], vocab_size=300), tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).symlink_to(START_POLICY / name)
    stranger = arguments(episodes, tmp_path / "run", f"--model.path={tmp_path / 'other'}")
    assert command_line_of(["sft", *stranger]) == 1
    said = capfd.readouterr().err
    assert "DataError" in said and "holds ids of another tokenizer" in said and "Traceback" not in said
    monkeypatch.setattr(local, "free_bytes", lambda: 1 << 20)
    assert (
        command_line_of(["sft", *arguments(episodes, tmp_path / "run", "--safety.check_memory=refuse")]) == 2
    )
    said = capfd.readouterr().err
    assert "safety.check_memory: memory: planned" in said
    assert "concurrent_sequences" not in said, "nobody samples"
    assert command_line_of(["sft", *arguments(tmp_path, tmp_path / "run")]) == 1
    assert (
        "holds no episodes.json, expected a directory that `sd-search select` finished"
        in capfd.readouterr().err
    )
    assert command_line_of(["sft", *arguments(episodes, tmp_path / "run", "--episodes_per_step=0")]) == 2
    assert "episodes_per_step: found 0, expected 1 or more" in capfd.readouterr().err
    assert (
        command_line_of(["sft", *arguments(episodes, tmp_path / "run", "--optimiser.learning_rate=1")]) == 2
    )
    assert "did you mean" in capfd.readouterr().err
