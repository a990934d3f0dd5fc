"""The trainers that the overhead of SD-Search is measured on."""

import pytest

from benchmarks.training.overhead import build, phases
from data_prep.world.world import WorldConfig
from launch.programs import make_world


@pytest.mark.slow
def test_a_trainer_takes_a_step_that_is_timed(tmp_path):
    world = tmp_path / "world"
    make_world(WorldConfig(output=str(world), num_train_questions=40, num_eval_questions=10))
    trainer = build(world, tmp_path / "run", "--distill.block=none", "--rollout.questions_per_step=2")
    seconds = phases(trainer)
    assert set(seconds) == {"update", "whole step"} and trainer.step == 1
