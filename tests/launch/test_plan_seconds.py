"""Seconds of an update as the planner counts them."""

import pytest

from launch.cli import main as command_line
from launch.cluster.layout import LayoutConfig
from launch.planner.gpus import find_gpu
from launch.planner.models import model_config
from launch.planner.step_estimate import best_split, step_plan, update_seconds, whole_step_seconds
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


@pytest.mark.parametrize(("command", "option"), [("plan", "--gpus"), ("launch", "--rollout_nodes")])
def test_help_is_of_the_programs_own_options(command, option, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line([command, "--help"])
    assert ended.value.code == 0 and option in capsys.readouterr().out


SECONDS = {
    "rollout": 50.0,
    "update: products": 90.0,
    "update: communication, exposed": 10.0,
    "update: communication, hidden": 40.0,
    "publish": 2.0,
}


def test_a_step_by_hand():
    """Sampling and updating add up, or the longer one counts; what is hidden takes no time."""
    assert whole_step_seconds(SECONDS, max_lag=0) == 152.0
    assert whole_step_seconds(SECONDS, max_lag=1) == 102.0
    assert whole_step_seconds(SECONDS | {"rollout": 300.0}, max_lag=1) == 302.0


def test_nodes_are_dealt_as_a_step_is_shortest():
    """Of four nodes the 14B recipe's update needs three: with two each, or with one, a step takes longer. One node
    alone holds no ranks of 72B, whatever a step would take."""
    options = ["--rollout.engine=vllm", "--rollout.vllm.placement=server", "--rollout.max_lag=1"]
    model, gpu = model_config("qwen2.5-14b"), find_gpu("h100")
    config = run_config("qwen2.5-14b", options)
    deals = {n: LayoutConfig(cluster="slurm", nodes=n, rollout_nodes=4 - n) for n in (1, 2, 3)}
    seconds = {
        n: whole_step_seconds(step_plan(deal, config, model, gpu).seconds, max_lag=1)
        for n, deal in deals.items()
    }
    assert seconds[3] == min(seconds.values())
    for deal in deals.values():
        best, shortest = best_split(deal, config, model, gpu)
        assert (best.nodes, best.rollout_nodes, shortest) == (3, 1, seconds[3])
    large = run_config("qwen2.5-72b", options)
    layout = LayoutConfig(cluster="slurm", nodes=7, rollout_nodes=1)
    best, _ = best_split(layout, large, model_config("qwen2.5-72b"), gpu)
    assert best.nodes > 2
