"""Teachers with weights of their own: the start policy's stay, an average follows, and both read what the
live teacher reads."""

from typing import get_args, get_type_hints

import pytest
import torch

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.config import DistillConfig
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import CheckpointError
from megatron_sd.training.teacher_side.teacher import TEACHERS
from tests.rank_programs.update_steps import Order, batch_of, take_steps
from tests.training.fakes import make_config, make_policy, write_model

NUM_STEPS = 3


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher") / "model")


def outcome(world, model_path, *, stage=3, steps=NUM_STEPS, checkpoint=None, **distill):
    config = {"distill": {"measure_every": 0, **distill}, "update": {"zero_stage": stage}}
    return take_steps(Order(model=str(model_path), steps=steps, config=config, checkpoint=checkpoint), world)


def distances(outcome):
    return [metrics["loss/distill"] for metrics in outcome["history"]]


def test_every_teacher_of_the_configuration_exists():
    assert set(get_args(get_type_hints(DistillConfig)["teacher"])) == set(TEACHERS)


@pytest.mark.parametrize("stage", [3, 0])
@pytest.mark.slow
def test_the_limits_of_the_average_are_the_live_and_the_frozen_teacher(world, model_path, stage):
    live, frozen = (outcome(world, model_path, stage=stage, teacher=name) for name in ("live", "frozen"))
    follows, stays = (
        outcome(world, model_path, stage=stage, teacher="ema", ema_decay=decay) for decay in (0.0, 1.0)
    )
    between = outcome(world, model_path, stage=stage, teacher="ema", ema_decay=0.5)
    assert distances(follows) == pytest.approx(distances(live), rel=1e-4)
    assert distances(stays) == distances(frozen)
    assert distances(frozen)[0] == pytest.approx(distances(live)[0], rel=1e-5), (
        "all begin as the start policy"
    )
    assert distances(frozen)[2] != pytest.approx(distances(live)[2], rel=1e-3)
    assert distances(between)[2] != pytest.approx(distances(live)[2], rel=1e-4)
    assert distances(between)[2] != pytest.approx(distances(frozen)[2], rel=1e-4)


def test_stages_agree_and_an_untied_head_is_gathered(world, tmp_path):
    path = write_model(tmp_path / "model", tied=False)
    whole, sharded = (outcome(world, path, stage=stage, teacher="ema", ema_decay=0.5) for stage in (1, 3))
    assert distances(whole) == pytest.approx(distances(sharded), rel=1e-5)


def test_a_frozen_teacher_is_the_start_policy_after_any_number_of_steps(world, model_path):
    """Its hidden states and head are those of the model on disk, while the student has moved."""
    config = make_config(
        model_path, distill={"measure_every": 0, "teacher": "frozen"}, optimizer={"learning_rate": 0.05}
    )
    policy = make_policy(config, world)
    (microbatch,) = batch_of(Order(model="", max_tokens=10_000), world, "token")
    totals = batch_of(Order(model="", max_tokens=10_000), world, "token").totals
    found = []
    rows = policy._teacher.rows

    def noted(on_device):
        context = rows(on_device)
        with context as read:
            found.append((read.hidden.clone(), read.head[0].clone()))
        return rows(on_device)

    policy._teacher.rows = noted
    for _ in range(2):
        policy.accumulate(
            microbatch, totals, TermWeights(policy=1.0, distill_spread=0.5, distill_no_spread=0.5)
        )
        policy.step()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_an_average_is_resumed_where_it_was(world, model_path, tmp_path):
    straight = outcome(world, model_path, steps=4, teacher="ema", ema_decay=0.5)
    outcome(world, model_path, steps=2, teacher="ema", ema_decay=0.5, checkpoint=str(tmp_path))
    resumed = outcome(world, model_path, steps=4, teacher="ema", ema_decay=0.5, checkpoint=str(tmp_path))
    assert distances(resumed) == pytest.approx(distances(straight)[2:], rel=1e-6)
    for name, parameter in straight["parameters"].items():
        torch.testing.assert_close(resumed["parameters"][name], parameter, rtol=0, atol=1e-6)


def test_a_missing_average_is_named(world, model_path, tmp_path):
    policy = make_policy(make_config(model_path, distill={"measure_every": 0, "teacher": "ema"}), world)
    policy.write_state(tmp_path)
    (tmp_path / "teacher_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="teacher_00000.safetensors is missing, expected the average"):
        policy.read_state(tmp_path)
