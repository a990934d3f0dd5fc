"""Two real processes against one: the same step. One start serves every test here."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sd.distributed.world import join_world
from megatron_sd.durable import directories
from tests.launched import outcomes_on
from tests.rank_programs.update_steps import Order, take_steps
from tests.training.fakes import write_model
from tests.training.same_steps import assert_same_steps

pytestmark = pytest.mark.ranks
ALONE_TOO = ("steps", "untied", "rollout_mean", "one_sample", "no_query_on_one_rank", "ema_teacher")


def orders(directory: Path) -> dict[str, dict]:
    model, untied = str(directory / "model"), str(directory / "untied")
    plain = {"distill": {"measure_every": 0}}
    average = {"distill": {"measure_every": 0, "teacher": "ema", "ema_decay": 0.5}}
    return {
        "steps": {"model": model, "steps": 3, "config": {"kl_weight": 0.05}},
        "untied": {"model": untied, "steps": 1},
        "rollout_mean": {"model": model, "steps": 1, "config": {"aggregation": "rollout"}},
        "no_query_on_one_rank": {"model": model, "steps": 2, "only": [0, 3], "config": plain},
        "one_sample": {"model": model, "steps": 2, "num_samples": 1, "config": plain},
        "ema_teacher": {"model": untied, "steps": 3, "config": average},
        "stage_1": {"model": model, "steps": 2, "config": plain | {"update": {"zero_stage": 1}}},
        "stage_2": {"model": model, "steps": 2, "config": plain | {"update": {"zero_stage": 2}}},
        "poisoned": {"model": model, "steps": 1, "poison": {"0": 1}},
        "straight": {"model": model, "steps": 4},
        "first_half": {"model": model, "steps": 2, "checkpoint": str(directory / "ck")},
        "second_half": {
            "model": model,
            "steps": 4,
            "checkpoint": str(directory / "ck"),
            "file_bytes": 10_000,
            "config": {"checkpoint": {"background": True}},
        },
        "full_disk": {"model": model, "steps": 5, "checkpoint": str(directory / "ck"), "full_disk_rank": 1},
        "full_disk_in_background": {
            "model": model,
            "steps": 5,
            "checkpoint": str(directory / "ck"),
            "full_disk_rank": 1,
            "config": {"checkpoint": {"background": True}},
        },
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """name -> (of a world of one, of rank 0 of two, of rank 1 of two)."""
    directory = tmp_path_factory.mktemp("ranks")
    write_model(directory / "model")
    write_model(directory / "untied", tied=False, seed=1)
    wanted = orders(directory)
    both = outcomes_on(2, wanted, directory)
    world = join_world()
    alone = {name: take_steps(Order(**wanted[name]), world) for name in ALONE_TOO}
    return {name: (alone.get(name), *both[name]) for name in wanted} | {"directory": directory}


@pytest.mark.parametrize("name", ALONE_TOO)
def test_two_ranks_take_the_step_of_one(outcomes, name):
    """Losses, gradient norms, KL to the reference and the gradient ratio to 2e-6; AdamW's steps within its
    rounding."""
    alone, first, second = outcomes[name]
    assert first["history"] == second["history"]
    for one, two in zip(alone["history"], first["history"], strict=True):
        assert two == pytest.approx(one, rel=4e-6, abs=2e-6)
    for key in alone["parameters"]:
        assert torch.equal(first["parameters"][key], second["parameters"][key])
    assert_same_steps([first, second], [alone])


def test_both_ranks_have_work_and_as_many_microbatches(outcomes):
    _, first, second = outcomes["steps"]
    assert len(first["rows"]) == len(second["rows"]) and sum(first["rows"]) > 0 and sum(second["rows"]) > 0


def test_a_rank_without_rows_or_without_queries_does_not_hang(outcomes):
    """One sample on two ranks: the other rank runs an empty microbatch. Two samples, of which one never
    searched."""
    _, first, second = outcomes["one_sample"]
    assert sorted([first["rows"], second["rows"]])[0] == [0]
    _, first, second = outcomes["no_query_on_one_rank"]
    assert (
        sorted([first["query_rows"], second["query_rows"]])[0] == [0]
        and min(first["rows"] + second["rows"]) > 0
    )


@pytest.mark.parametrize("name", ["stage_1", "stage_2"])
def test_other_stages_agree(outcomes, name):
    _, found, _ = outcomes[name]
    _, expected, _ = outcomes["straight"]
    for one, two in zip(expected["history"], found["history"]):
        shared = one.keys() & two.keys()
        assert {k: two[k] for k in shared} == pytest.approx({k: one[k] for k in shared}, rel=2e-5, abs=2e-6)


def test_a_nan_on_one_rank_stops_both(outcomes):
    """Both name the rank; neither moved."""
    start = take_steps(Order(model=str(outcomes["directory"] / "model"), steps=0), join_world())
    for outcome in outcomes["poisoned"][1:]:
        (error,) = outcome["errors"]
        assert "the loss of rank 1 is not finite at step 0: no rank took the optimiser step" in error
        assert outcome["version"] == 0
        assert all(
            torch.equal(tensor, start["parameters"][name]) for name, tensor in outcome["parameters"].items()
        )


def test_resumed_on_two_ranks_is_bit_identical(outcomes):
    for rank in (1, 2):
        straight, first, second = (outcomes[name][rank] for name in ("straight", "first_half", "second_half"))
        assert first["history"] + second["history"] == straight["history"]
        assert all(
            torch.equal(second["parameters"][name], tensor) for name, tensor in straight["parameters"].items()
        )


def test_ranks_write_the_models_files_in_turn(outcomes):
    """Each is sealed by who wrote it, and all make one model."""
    directory = outcomes["directory"] / "ck" / "step_00000004"
    assert len(list((directory / "model").glob("model-*-of-*.safetensors"))) > 4
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    expected = outcomes["second_half"][1]["parameters"]
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_what_two_ranks_saved_one_takes_up_bit_for_bit(outcomes, tmp_path):
    shutil.copytree(outcomes["directory"] / "ck" / "step_00000004", tmp_path / "step_00000004")
    order = Order(model=str(outcomes["directory"] / "model"), steps=4, checkpoint=str(tmp_path), save=False)
    alone, two = take_steps(order, join_world()), outcomes["second_half"][1:]
    assert all(torch.equal(alone["parameters"][name], value) for name, value in two[0]["parameters"].items())
    for name, (start, moments) in alone["moments"].items():
        assert start == 0
        for first, part in (rank["moments"][name] for rank in two if name in rank["moments"]):
            assert torch.equal(moments[first : first + len(part)], part), name


@pytest.mark.parametrize("name", ["full_disk", "full_disk_in_background"])
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_both(outcomes, name):
    """And neither waits in a barrier; the checkpoints before it stay."""
    for outcome in outcomes[name][1:]:
        assert re.search(
            r"could not write .*step_00000005.tmp \(rank 1: .*rank_00001.safetensors", outcome["errors"][0]
        )
    names = [path.name for path in directories.committed(outcomes["directory"] / "ck")]
    assert names == ["step_00000004", "step_00000002"]
    assert all(directories.find_damage(outcomes["directory"] / "ck" / name) is None for name in names)
