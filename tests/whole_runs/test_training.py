"""Whole runs through the real door: DeepSpeed ZeRO-3, embedded engine, BM25, the committed start policy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from tests.training.same_steps import assert_same_moments, assert_same_movement, saved_moments
from tests.whole_runs.runs import (
    START_POLICY,
    on_the_world,
    parameters,
    run,
    run_launched,
    start,
    without_clocks,
)

NUM_STEPS = 4
LAST = f"step_{NUM_STEPS:08}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=60, num_eval_questions=20))
    return output


def arguments(world: Path, run_dir: Path, *overrides: str) -> list[str]:
    return on_the_world(
        world,
        run_dir,
        f"--data.eval={world / 'questions.jsonl'}",
        f"--num_steps={NUM_STEPS}",
        "--rollout.questions_per_step=4",
        "--distill.alpha.warmup_steps=1",
        "--distill.measure_every=2",
        "--distill.gate=none",
        "--optimizer.warmup_steps=0",
        "--log.transcripts_every=1",
        *overrides,
    )


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    run_launched(1, arguments(world, run_dir))
    return run_dir


def transcripts(run_dir: Path) -> list[str]:
    return [path.read_text() for path in sorted((run_dir / "transcripts").glob("*.jsonl"))]


def sampled_ids(run_dir: Path) -> list[list[int]]:
    records = [json.loads(line) for text in transcripts(run_dir) for line in text.splitlines()]
    return [
        turn["completion_ids"]
        for record in records
        for rollout in record["rollouts"]
        for turn in rollout["turns"]
    ]


@pytest.mark.slow
def test_a_run_trains_distils_and_measures(straight):
    assert (straight / "control").is_dir(), "where anybody may put STOP"
    steps = without_clocks(straight)
    assert list(steps) == [1, 2, 3, 4]
    assert steps[1]["distill/alpha"] == 0.0, "warm-up"
    assert all(steps[s]["distill/alpha"] > 0 for s in (2, 3, 4))
    assert any(metrics.get("distill/divergence_nats", 0.0) > 0 for metrics in steps.values())
    assert any("distill/grad_ratio" in metrics for metrics in steps.values())
    assert all(abs(metrics["rollout/logprob_gap_nats"]) < 1e-4 for metrics in steps.values())
    before, after = load_file(START_POLICY / "model.safetensors"), parameters(straight, LAST)
    assert any(not np.array_equal(before[name], after[name]) for name in after)


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bit_for_bit(world, straight, tmp_path):
    argv = arguments(world, tmp_path, "--checkpoint.every=2")
    ranks = start(1, argv)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        log = tmp_path / "metrics.jsonl"
        if log.exists() and '"step": 3' in log.read_text():
            break
        time.sleep(0.02)
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert not (tmp_path / "checkpoints" / "step_00000004").exists()
    assert "resumed from" in run(1, argv)
    expected, found = parameters(straight, LAST), parameters(tmp_path, LAST)
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.array_equal(expected[name], found[name]), name
    assert without_clocks(tmp_path) == without_clocks(straight)
    assert transcripts(tmp_path) == transcripts(straight)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "sharing", [(), ("--update.sequence_parallel_size=2",), ("--update.tensor_parallel_size=2",)]
)
def test_two_ranks_equal_one(world, straight, tmp_path, sharing):
    """Each with its own microbatches, started by DeepSpeed's launcher, or both with the same, of which they
    share sequences or layers."""
    run_two = run if sharing else run_launched
    run_two(2, arguments(world, tmp_path, *sharing))
    assert sampled_ids(tmp_path) == sampled_ids(straight), (
        "the same questions, seeds and weights give the same rollouts"
    )
    expected, found, start = (
        {name: torch.from_numpy(array) for name, array in arrays.items()}
        for arrays in (
            parameters(straight, LAST),
            parameters(tmp_path, LAST),
            load_file(START_POLICY / "model.safetensors"),
        )
    )
    assert_same_movement(found, expected, start)
    if "tensor_parallel" not in str(sharing):  # which cuts moments otherwise
        assert_same_moments(
            *(
                saved_moments(directory / "checkpoints" / LAST / "shards")
                for directory in (tmp_path, straight)
            )
        )
    one, two = without_clocks(straight), without_clocks(tmp_path)
    for step in one:
        for name in ("loss/policy", "reward/mean", "rollout/searches", "distill/alpha"):
            assert two[step][name] == pytest.approx(one[step][name], abs=2e-5, rel=1e-3), (step, name)


@pytest.mark.slow
def test_while_alpha_warms_up_the_run_is_grpo_bit_for_bit_evaluated_or_not(world, tmp_path):
    run(1, arguments(world, tmp_path / "grpo", "--distill.block=none", "--log.eval_every=1"))
    run(1, arguments(world, tmp_path / "warm-up", "--distill.alpha.warmup_steps=99"))
    assert all("eval/reward/em" in metrics for metrics in without_clocks(tmp_path / "grpo").values())
    expected, found = parameters(tmp_path / "grpo", LAST), parameters(tmp_path / "warm-up", LAST)
    for name in expected:
        assert np.array_equal(expected[name], found[name]), name


def test_errors_of_a_run_are_one_line(world, tmp_path):
    argv = arguments(world, tmp_path, "--model.path=/nowhere")
    found = subprocess.run(
        [sys.executable, "-m", "megatron_sd.train", *argv], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "DataError" in found.stderr
    assert "/nowhere" in found.stderr


def test_the_demo_recipe_is_complete(world, tmp_path):
    from megatron_sd.config.load import dump, load

    config = load(arguments(world, tmp_path))
    assert json.loads(json.dumps(dump(config)))
    assert config.distill.block_format == "outcome_first", "the start policy has only seen that form"
