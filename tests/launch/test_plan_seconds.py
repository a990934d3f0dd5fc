"""Seconds of an update as the planner counts them."""

import pytest

from launch.cluster.layout import LayoutConfig
from launch.planner.models import model_config
from launch.planner.step_estimate import update_seconds
from tests.launch.test_plan import run_config


def test_communication_is_hidden_behind_products():
    """All of it but a layer's, while products take longer; the rest where they do not."""
    model = model_config("qwen2.5-7b")
    config = run_config("qwen2.5-7b", ["--update.max_microbatch_tokens=16384"])
    layout = LayoutConfig(cluster="slurm", nodes=8)

    def seconds(tokens: int) -> dict[str, float]:
        found = update_seconds(layout, config, model, rollout_tokens=tokens, teacher_tokens=0)
        return {name.removeprefix("update: "): value for name, value in found.items()}

    full = seconds(16_384 * 64)
    whole = full["communication, exposed"] + full["communication, hidden"]
    # forward, backward and start policy gather 7.6 G parameters in bfloat16, the backward reduces their gradients
    assert whole == pytest.approx(4 * 2 * 7.6156e9 * 63 / 64 / 200e9, rel=1e-3)
    assert full["products"] > whole and full["communication, exposed"] == pytest.approx(whole / 28)
    short = seconds(64)  # a token a rank: as much is moved
    assert short["communication, exposed"] == pytest.approx(whole - short["products"])


def test_epochs_and_reading_anew_are_counted():
    model, layout = model_config("qwen2.5-7b"), LayoutConfig(cluster="slurm", nodes=1)

    def products(*options: str) -> float:
        config = run_config("qwen2.5-7b", ["--distill.block=none", "--policy_loss.kl_weight=0", *options])
        found = update_seconds(layout, config, model, rollout_tokens=10**6, teacher_tokens=0)
        return found["update: products"]

    plain, passes = products(), 4  # forward, twice of it backward, again under checkpointing
    assert products("--update.epochs=2") == pytest.approx(plain * (2 * passes + 1) / passes)
    assert products("--update.minibatches=2") == pytest.approx(plain * (passes + 1) / passes)
