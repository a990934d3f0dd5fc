"""The trainers that the overhead of SD-Search is measured on, and the estimators' share of a step."""

import pytest

from benchmarks.training.estimators import median_seconds
from benchmarks.training.overhead import build, phases
from data_prep.world.world import WorldConfig
from launch.programs import make_world
from megatron_sd.algorithm.advantages.table import ADVANTAGES
from megatron_sd.config import AdvantageConfig
from megatron_sd.own_code import example_groups


@pytest.mark.slow
def test_a_trainer_takes_a_step_that_is_timed(tmp_path):
    world = tmp_path / "world"
    make_world(WorldConfig(output=str(world), num_train_questions=40, num_eval_questions=10))
    trainer = build(world, tmp_path / "run", "--distill.block=none", "--rollout.questions_per_step=2")
    seconds = phases(trainer)
    assert 0 < seconds["update"] < seconds["whole step"] and trainer.step == 1


def test_an_estimator_is_timed_on_groups():
    assert 0 < median_seconds(ADVANTAGES["grpo"], AdvantageConfig(), [example_groups()]) < 1.0
