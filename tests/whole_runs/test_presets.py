"""Every method by its name: three steps on the world, on one rank and on two; three of them killed and resumed."""

from __future__ import annotations

import functools
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from data_prep.world.world import WorldConfig
from launch.presets import expand, presets
from launch.programs import make_world
from tests.training.same_steps import assert_same_movement
from tests.whole_runs.runs import START_POLICY, on_the_world, parameters, run, start, without_clocks

LAST = "step_00000003"
# the demo's rollouts, fewer and shorter
SMALL = ("--rollout.group_size=3", "--rollout.max_search_turns=2", "--rollout.max_turn_tokens=32")
# an estimator, minibatches, a reading with a teacher of its own, a critic, queries that the engine is asked for
KILLED = ("gigpo", "gspo", "turnsight", "search_r1_ppo", "igsd")
EVERY = ("--checkpoint.every=1", "--checkpoint.keep=3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=40, num_eval_questions=10))
    shutil.copytree(START_POLICY, output / "teacher")  # another model: one like the student teaches nothing
    weights = load_file(output / "teacher" / "model.safetensors")
    noise = np.random.default_rng(0)
    moved = {
        key: array + 0.02 * noise.standard_normal(array.shape, np.float32) for key, array in weights.items()
    }
    save_file(moved, output / "teacher" / "model.safetensors", metadata={"format": "pt"})
    return output


def arguments(name: str, world: Path, run_dir: Path, *options: str) -> list[str]:
    """Of a run of the method on the world, whose rollouts, protocol and learning rate stay the world's."""
    argv = [
        f"--as={name}",
        *on_the_world(world, run_dir),
        "--num_steps=3",
        "--protocol.preset=compact",
        "--rollout.questions_per_step=4",
        "--optimizer.learning_rate=1e-4",
        "--optimizer.warmup_steps=0",
        "--log.transcripts_every=1",
        *SMALL,
    ]
    own = yaml.safe_load(presets()[name].path.read_text(encoding="utf-8"))
    if own.get("update", {}).get("minibatches", 1) > 2:
        argv.append("--update.minibatches=2")
    if "attempts" in own.get("rollout", {}):  # one context for all of them
        argv += ["--rollout.max_observation_tokens=48", "--rollout.max_rollout_tokens=720"]
    if own.get("rollout", {}).get("group_size") == 1:
        argv += ["--rollout.group_size=1", "--rollout.questions_per_step=12"]  # of which some are right
        argv += ["--critic.learning_rate=1e-3", "--critic.warmup_steps=0"]
    if own["distill"].get("teacher") == "other":
        argv.append(f"--distill.teacher_path={world / 'teacher'}")
    if own["distill"]["block"] != "none":
        argv += ["--distill.alpha.warmup_steps=0", "--distill.block_format=outcome_first"]
    return expand([*argv, *options])[0]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """By a method's name: its run on one rank, made once, which saves every step where one is killed beside it."""

    @functools.cache
    def made(name: str) -> Path:
        run_dir = tmp_path_factory.mktemp(name) / "one"
        run(1, arguments(name, world, run_dir, *(EVERY if name in KILLED else ())))
        return run_dir

    return made


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted(presets()))
def test_a_method_takes_three_steps_on_one_rank_as_on_two(name, world, straight, tmp_path):
    run(2, arguments(name, world, tmp_path / "two"))
    one, two = without_clocks(straight(name)), without_clocks(tmp_path / "two")
    assert list(one) == [1, 2, 3] and any(metrics["optim/grad_norm"] > 0 for metrics in one.values())
    for step, metrics in one.items():
        figures = ("loss/policy", "loss/distill", "reward/mean", "rollout/searches", "optim/grad_norm")
        figures += ("critic/loss", "critic/explained_variance", "critic/clipped", "critic/grad_norm")
        for key in filter(metrics.__contains__, figures):
            assert two[step][key] == pytest.approx(metrics[key], abs=2e-5, rel=1e-3), (step, key)
    found, expected = (
        {key: torch.from_numpy(array) for key, array in parameters(run_dir, LAST).items()}
        for run_dir in (tmp_path / "two", straight(name))
    )
    before = {key: torch.from_numpy(a) for key, a in load_file(START_POLICY / "model.safetensors").items()}
    assert_same_movement(found, expected, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_of_a_method_resumes_bit_for_bit(name, world, straight, tmp_path):
    argv = arguments(name, world, tmp_path / "killed", *EVERY)
    ranks, log = start(1, argv), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and '"step": 2' in log.read_text()):
        time.sleep(0.02)
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert "resumed from" in run(1, argv)
    expected, found = (parameters(run_dir, LAST) for run_dir in (straight(name), tmp_path / "killed"))
    for key, array in expected.items():
        assert np.array_equal(found[key], array), key
    assert without_clocks(tmp_path / "killed") == without_clocks(straight(name))


@pytest.mark.slow
def test_the_policy_waits_while_its_critic_warms_up(world, tmp_path):
    """Two steps of the critic alone, on rollouts of the start policy; the third trains both."""
    run(1, arguments("search_r1_ppo", world, tmp_path, "--critic.warmup_only_steps=2", *EVERY))
    start = load_file(START_POLICY / "model.safetensors")
    second, last = (parameters(tmp_path, step) for step in ("step_00000002", LAST))
    assert all(np.array_equal(second[key], array) for key, array in start.items())
    assert any(not np.array_equal(last[key], array) for key, array in start.items())
    metrics = without_clocks(tmp_path)
    assert [own["optim/learning_rate"] for own in metrics.values()] == [0.0, 0.0, 1e-4]
    assert all(own["critic/grad_norm"] > 0.0 for own in metrics.values())
    assert "loss/policy" not in metrics[2] and "loss/policy" in metrics[3]
