"""What lets a model be larger, on two real ranks: offloading, checkpointing activations, bfloat16,
adapters. One launch."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

from megatron_sd.config import LoraConfig
from megatron_sd.config.load import load
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError
from megatron_sd.training.lora import FullAdapter, LoraLinear, with_adapters
from megatron_sd.training.parallel.local_shards import LocalShards, shard_layout
from megatron_sd.training.publisher import full_adapters, gathered_buckets
from tests.launched import outcomes_on
from tests.rank_programs.update_steps import Order, take_steps
from tests.training.fakes import make_config, make_policy, write_model
from tests.training.same_steps import assert_same_steps

LORA = {"rank": 4, "alpha": 8.0}
REQUIRED = ("--run_dir=r", "--model.path=m", "--data.train=q", "--retriever.corpus=c")
# Name -> what differs from plain ZeRO-3 in float32.
FEATURES = {
    "plain": {},
    "optimizer_in_host_memory": {"update": {"offload_optimizer": "cpu"}},
    "all_in_host_memory": {"update": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "adapters": {"model": {"lora": LORA}},
    "adapters_checkpointing": {"model": {"lora": LORA, "gradient_checkpointing": True}},
    "adapters_stage_2": {"model": {"lora": LORA}, "update": {"zero_stage": 2}},
}


def order_of(model: Path, config: dict) -> dict:
    return {
        "model": str(model),
        "steps": 2,
        "num_samples": 6,
        "config": {"distill": {"measure_every": 0}} | config,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("scale") / "model")


@pytest.fixture(scope="module")
def outcomes(model, tmp_path_factory):
    """Feature -> the outcome on rank 0 and on rank 1."""
    directory = tmp_path_factory.mktemp("outcomes")
    orders = {name: order_of(model, config) for name, config in FEATURES.items()}
    for half, steps in (("first_half", 1), ("second_half", 2)):
        orders[half] = orders["adapters"] | {"steps": steps, "checkpoint": str(directory / "checkpoints")}
    return outcomes_on(2, orders, directory)


def assert_close(found: Sequence[dict], expected: Sequence[dict], *, figures: float = 4e-6) -> None:
    """The outcomes of all ranks."""
    for one, other in zip(found[0]["history"], expected[0]["history"], strict=True):
        assert one == pytest.approx(other, rel=figures, abs=figures)
    assert_same_steps(found, expected)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted(FEATURES))
def test_both_ranks_end_with_the_same_parameters(outcomes, name):
    first, second = outcomes[name]
    assert first["errors"] == [] and first["version"] == 2
    assert all(torch.equal(tensor, second["parameters"][key]) for key, tensor in first["parameters"].items())


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["optimizer_in_host_memory", "all_in_host_memory", "checkpointing"])
def test_where_state_lies_changes_no_step(outcomes, name):
    assert_close(outcomes[name], outcomes["plain"])


@pytest.mark.ranks
def test_bfloat16_takes_nearly_the_step_of_float32(outcomes):
    found, expected = outcomes["bfloat16"][0], outcomes["plain"][0]
    assert {tensor.dtype for tensor in found["parameters"].values()} == {torch.bfloat16}
    for one, other in zip(found["history"], expected["history"], strict=True):
        for name in ("loss/policy", "loss/distill", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=0.03, abs=1e-3)


@pytest.mark.ranks
def test_adapters_take_the_same_steps_at_any_stage_and_with_checkpointing(outcomes):
    for name in ("adapters_checkpointing", "adapters_stage_2"):
        assert_close(outcomes[name], outcomes["adapters"], figures=2e-5)


@pytest.mark.ranks
def test_adapters_resume_bit_for_bit(outcomes):
    """And the checkpoint's model is the merged one."""
    straight, first, second = (outcomes[name][0] for name in ("adapters", "first_half", "second_half"))
    assert first["errors"] == second["errors"] == []
    assert first["history"] + second["history"] == straight["history"]
    assert all(
        torch.equal(second["parameters"][name], tensor) for name, tensor in straight["parameters"].items()
    )


@pytest.mark.ranks
def test_two_ranks_of_adapters_take_the_step_of_one(outcomes, model):
    alone = take_steps(Order(**order_of(model, FEATURES["adapters"])), join_world())
    assert_close(outcomes["adapters"], [alone])


@pytest.mark.ranks
def test_what_is_handed_out_is_the_model_with_its_adapters(outcomes, model):
    """Hugging Face's names; the weights that have adapters moved, by a matrix of low rank, and nothing else
    did."""
    start = take_steps(Order(model=str(model), steps=0), join_world())["parameters"]
    found = outcomes["adapters"][0]["parameters"]
    assert found.keys() == start.keys()
    for name, parameter in found.items():
        moved = parameter - start[name]
        if name.endswith("_proj.weight"):
            assert 0 < torch.linalg.matrix_rank(moved, rtol=1e-3) <= LORA["rank"], name
        else:
            assert not moved.any(), name


def test_at_the_start_an_adapter_adds_nothing_and_then_what_it_says():
    torch.manual_seed(0)
    plain = torch.nn.Linear(6, 5)
    layer = LoraLinear(plain, LoraConfig(rank=2, alpha=3.0), torch.Generator().manual_seed(0))
    hidden = torch.randn(4, 6)
    assert torch.equal(layer(hidden), plain(hidden))
    torch.nn.init.normal_(layer.lora_b)
    expected = plain(hidden) + hidden @ (1.5 * layer.lora_b @ layer.lora_a).T
    torch.testing.assert_close(layer(hidden), expected)


@pytest.mark.parametrize("bounds", [(0, 30), (0, 0), (7, 8), (5, 24), (12, 18), (29, 30)])
def test_elements_of_an_adapter_are_those_of_its_rows(bounds):
    torch.manual_seed(0)
    adapter = FullAdapter(a=torch.randn(2, 6), b=torch.randn(5, 2), scale=0.5)
    whole = (0.5 * adapter.b @ adapter.a).flatten()
    torch.testing.assert_close(adapter.elements(*bounds), whole[slice(*bounds)])


def test_a_shard_is_published_with_its_share_of_the_adapter(model):
    """What a worker gets from the shards is what gathering gives."""
    policy = make_policy(make_config(model, model={"lora": LoraConfig(**LORA)}), join_world())
    names = {name for name, _ in policy.named_parameters()}
    assert not [name for name in names if "lora" in name]
    for name, parameter in policy.model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter.ds_tensor)
    adapters = full_adapters(policy.named_parameters())
    layout = shard_layout(policy.named_parameters(), world_size=1, dtype="float32")
    shards = LocalShards(policy.named_parameters(), layout, rank=0, adapters=adapters)
    assert set(adapters) == {name for name in names if name.endswith("_proj.weight")}
    for bucket in gathered_buckets(policy.named_parameters(), 20_000):
        for name, whole in bucket:
            torch.testing.assert_close(shards[name], whole.flatten(), rtol=0, atol=1e-5)


def test_the_base_model_alone_is_what_a_model_without_targets_would_be(model):
    from transformers import AutoModelForCausalLM

    with pytest.raises(
        ConfigError,
        match=r"model.lora.targets: found \['qproj'\], expected names of the model's linear layers",
    ):
        with_adapters(
            AutoModelForCausalLM.from_pretrained(model), LoraConfig(rank=2, targets=("qproj",)), seed=0
        )


@pytest.mark.ranks
@pytest.mark.slow
def test_an_optimizer_on_a_disk_takes_the_same_steps(tmp_path):
    """DeepSpeed compiles its disk operation at the first start: five CPU minutes, for which a test run has
    no time."""
    if "SD_SEARCH_DISK_OFFLOAD" not in os.environ:
        pytest.skip(
            "SD_SEARCH_DISK_OFFLOAD is not set: DeepSpeed would compile for it (libaio-dev, five CPU minutes)"
        )
    large = write_model(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=4000
    )
    disk, seen, is_over = tmp_path / "disk", set(), threading.Event()
    disk.mkdir()

    def watch() -> None:  # DeepSpeed swaps a megabyte or more, and removes its files when it ends
        while not is_over.wait(0.1):
            seen.update(path.parent.name for path in disk.rglob("exp_avg_sq-*.swp"))

    watching = threading.Thread(target=watch)
    watching.start()
    offloaded = {"update": {"offload_optimizer": "nvme", "nvme_path": str(disk)}}
    orders = {name: order_of(large, config) for name, config in (("plain", {}), ("offloaded", offloaded))}
    outcomes = outcomes_on(2, orders, tmp_path)
    is_over.set()
    watching.join()
    assert seen == {"rank0", "rank1"}
    assert_close(outcomes["offloaded"], outcomes["plain"], figures=1e-5)


def test_offloading_to_a_disk_without_the_disk_operation_is_refused(model, tmp_path, monkeypatch):
    """As where libaio is missing: DeepSpeed's own test program does not link."""
    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda *_, **__: False)
    config = make_config(model, update={"offload_optimizer": "nvme", "nvme_path": str(tmp_path)})
    with pytest.raises(
        ConfigError, match="update.offload_optimizer: found nvme, and no libaio on this machine"
    ):
        make_policy(config, join_world())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--update.offload_optimizer=cpu", "--update.zero_stage=0"],
            "update.offload_optimizer: found cpu at zero_stage 0",
        ),
        (
            ["--update.offload_parameters=cpu", "--update.zero_stage=2"],
            "update.offload_parameters: found cpu at zero_stage 2",
        ),
        (["--update.offload_optimizer=nvme"], "update.nvme_path: found None with offload_optimizer nvme"),
        (["--update.nvme_path=/disk"], "update.nvme_path: found '/disk' with offload_optimizer none"),
        (
            ["--model.lora.rank=2", "--publish.source=master"],
            "publish.source: found master with model.lora.rank above 0",
        ),
        (
            ["--model.lora.rank=2", "--distill.teacher=ema"],
            "distill.teacher: found ema with model.lora.rank above 0",
        ),
        (["--model.lora.rank=-1"], "model.lora.rank: found -1, expected 0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    plain = ["--distill.measure_every=0"]
    with pytest.raises(ConfigError, match=message):
        load([*REQUIRED, *plain, *arguments])
