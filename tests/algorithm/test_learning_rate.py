"""Learning-rate schedules against values computed by hand, and what is refused of them."""

from typing import get_args, get_type_hints

import pytest

from megatron_sd.algorithm.learning_rate import SCHEDULES, learning_rate
from megatron_sd.config import OptimizerConfig
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError

REQUIRED = ("--run_dir=r", "--model.path=m", "--data.train=q", "--retriever.corpus=c")


def rates(num_steps: int, *, until: int | None = None, **fields) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **fields)
    return [learning_rate(step, num_steps, config) for step in range(until or num_steps)]


@pytest.mark.parametrize(
    ("fields", "num_steps", "expected"),
    [
        ({"schedule": "linear"}, 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "linear", "final_ratio": 0.2}, 5, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "warmup_steps": 2}, 6, [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (
            {"schedule": "cosine"},
            5,
            [1.0, 0.853553390593, 0.5, 0.146446609407, 0.0],
        ),  # (1 + sqrt(1/2)) / 2 and its like
        (
            {"schedule": "cosine", "warmup_steps": 3, "final_ratio": 0.1},
            6,
            [1 / 3, 2 / 3, 1.0, 0.775, 0.325, 0.1],
        ),
        ({"schedule": "constant", "warmup_steps": 4}, 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine", "warmup_steps": 4}, 3, [0.25, 0.5, 0.75]),  # ends within its warm-up
        ({"schedule": "cosine", "warmup_steps": 2}, 2, [0.5, 1.0]),
        ({"schedule": "linear"}, 1, [1.0]),
    ],
)
def test_rates_are_those_of_a_hand(fields, num_steps, expected):
    assert rates(num_steps, **fields) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_ends_are_exact_and_the_floor_is_kept(schedule):
    found = rates(1000, until=1010, schedule=schedule, warmup_steps=7, final_ratio=0.3)
    assert found[6] == 1.0 and set(found[999:]) == {0.3}
    assert all(later < earlier for earlier, later in zip(found[6:], found[7:1000]))


@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 7, 50])
def test_a_constant_rate_is_bit_for_bit_what_it_was_before_there_were_schedules(warmup_steps):
    config = OptimizerConfig(learning_rate=3.7e-6, warmup_steps=warmup_steps)
    before = [config.learning_rate * min((step + 1) / max(warmup_steps, 1), 1.0) for step in range(60)]
    assert [learning_rate(step, 60, config) for step in range(60)] == before
    assert [learning_rate(step, 9, config) for step in range(60)] == before, "and knows of no last step"


def test_every_name_has_a_schedule():
    assert set(get_args(get_type_hints(OptimizerConfig)["schedule"])) == set(SCHEDULES)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("--optimizer.schedule=cosin",),
            "optimizer.schedule: found 'cosin', expected one of constant, linear, cosine; did you",
        ),
        (
            ("--optimizer.final_ratio=0.1",),
            "optimizer.final_ratio: found 0.1 with optimizer.schedule constant, expected none",
        ),
        (
            ("--optimizer.final_ratio=0",),
            "optimizer.final_ratio: found 0.0 with optimizer.schedule constant, expected none",
        ),
        (
            ("--optimizer.schedule=linear", "--optimizer.final_ratio=1.5"),
            "optimizer.final_ratio: found 1.5, expected between",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_named(overrides, said):
    with pytest.raises(ConfigError) as error:
        load([*REQUIRED, *overrides])
    assert str(error.value).startswith(said)
    assert (
        load([*REQUIRED, "--optimizer.schedule=linear", "--optimizer.final_ratio=0.1"]).optimizer.final_ratio
        == 0.1
    )
