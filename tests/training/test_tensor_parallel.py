"""Layers that ranks share: four real ranks, in groups of two, take the steps of one. One launch."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_sd.config import UpdateConfig
from megatron_sd.config.load import load
from megatron_sd.distributed.groups import RankGroup
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError
from megatron_sd.ops.head.vocab_parallel import VocabShard, own_rows
from megatron_sd.training.parallel.tensor import check_model, head_shard
from megatron_sd.training.state.identity import run_identity
from tests.launched import assert_same_figures, outcomes_on
from tests.rank_programs.update_steps import Order, take_steps
from tests.training.fakes import VOCABULARY, make_config, make_policy, write_model
from tests.training.same_steps import assert_same_movement

NUM_RANKS = 4
PLAIN = {"distill": {"measure_every": 0}}
# Name -> configuration of the steps, and what else is ordered. The start policy's engine must be a
# process's first, before
# DeepSpeed knows of the groups: hence the order.
CASES = {
    "measured": ({"kl_weight": 0.05}, {}),  # with a start policy, and the gradient ratio
    "qwen3": (PLAIN, {"model": "qwen3"}),  # norms of queries and keys see their own heads' gradient
    "untied": (PLAIN, {"model": "llama"}),
    "stage_1": (PLAIN | {"update": {"zero_stage": 1}}, {}),
    "stage_2": (PLAIN | {"update": {"zero_stage": 2}}, {}),
    "checkpointing": (PLAIN | {"model": {"gradient_checkpointing": True}}, {}),
    "host_memory": (PLAIN | {"update": {"offload_optimizer": "cpu"}}, {}),
    "forward_kl": ({"distill": {"measure_every": 0, "divergence": "forward_kl", "temperature": 0.7}}, {}),
    "small_chunks": (PLAIN | {"update": {"head_chunk_rows": 7}}, {}),
    "one_row": (PLAIN | {"update": {"pack_sequences": True}}, {}),
    "clipped": (PLAIN | {"optimizer": {"max_grad_norm": 0.1}}, {}),
    "one_sample": (PLAIN, {"num_samples": 1}),
}


def order_of(directory, name: str, *, parts: int = 2) -> dict:
    config, rest = CASES[name]
    update = config.get("update", {}) | {"tensor_parallel_size": parts}
    fields = {"steps": 2, "num_samples": 8} | rest
    return fields | {
        "model": str(directory / rest.get("model", "qwen2")),
        "config": config | {"update": update},
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """name -> what each of the four ranks made of it."""
    directory = tmp_path_factory.mktemp("parts")
    for family in ("qwen2", "qwen3", "llama"):
        write_model(directory / family, family=family, tied=family != "llama")
    orders = {name: order_of(directory, name) for name in CASES}
    saved = orders["untied"] | {"checkpoint": str(directory / "ck")}
    orders |= {"first_half": saved | {"steps": 1}, "second_half": saved | {"steps": 2}}
    half = {"model": {"dtype": "bfloat16"}, "update": {"tensor_parallel_size": 2}}
    orders["bfloat16"] = orders["untied"] | {"config": PLAIN | half}
    return outcomes_on(NUM_RANKS, orders, directory) | {"directory": directory}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", sorted(CASES))
def test_ranks_that_share_layers_take_the_step_of_one(outcomes, name):
    """Losses, gradient norms, the KL term and the gradient ratio; every rank hands out the same whole
    parameters."""
    first, *others = outcomes[name]
    alone = take_steps(Order(**order_of(outcomes["directory"], name, parts=1)), join_world())
    assert first["errors"] == [] and first["version"] == 2
    assert_same_figures(first, alone)
    assert_same_movement(first["parameters"], alone["parameters"], alone["start"])
    for key, parameter in first["parameters"].items():
        assert all(torch.equal(parameter, other["parameters"][key]) for other in others)


@pytest.mark.slow
@pytest.mark.ranks
def test_bfloat16_takes_nearly_the_step_of_float32(outcomes):
    one, other = (outcomes[name][0]["history"][0] for name in ("bfloat16", "untied"))
    for name in ("loss/policy", "loss/distill", "grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=0.01)


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_that_share_layers_resume_bit_for_bit(outcomes):
    """And the checkpoint's model is whole."""
    for straight, first, second in zip(outcomes["untied"], outcomes["first_half"], outcomes["second_half"]):
        assert first["errors"] == second["errors"] == []
        assert first["history"] + second["history"] == straight["history"]
        assert all(
            torch.equal(second["parameters"][name], tensor) for name, tensor in straight["parameters"].items()
        )
    saved = load_file(outcomes["directory"] / "ck" / "step_00000002" / "model" / "model.safetensors")
    assert saved.keys() == second["parameters"].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in second["parameters"].items())


def test_the_vocabulary_is_dealt_out_and_padded():
    shards = [head_shard(RankGroup(rank=rank, size=4, processes=None), VOCABULARY) for rank in range(4)]
    assert [(shard.start, shard.num_real) for shard in shards] == [(0, 25), (25, 25), (50, 25), (75, 22)]
    assert {shard.width for shard in shards} == {25}
    assert head_shard(RankGroup(rank=0, size=1, processes=None), VOCABULARY) is None
    weight = torch.randn(5, 3, requires_grad=True)
    gradients = torch.arange(18.0).view(2, 3, 3)
    second = own_rows(weight, VocabShard(start=3, num_real=2, width=3, gather=lambda _own: gradients))
    assert torch.equal(second, torch.cat([weight[3:], torch.zeros(1, 3)]))
    second.sum().backward()
    assert torch.equal(weight.grad, gradients.flatten(0, 1)[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--update.sequence_parallel_size=2"],
            "update.sequence_parallel_size: found 2 with update.tensor_parallel_size",
        ),
        (
            ["--update.zero_stage=0"],
            "update.zero_stage: found 0 with update.tensor_parallel_size above 1, expected 1 to 3",
        ),
        (["--update.offload_parameters=cpu"], "update.offload_parameters: found cpu"),
        (["--model.lora.rank=4"], "model.lora.rank: found 4"),
        (
            ["--distill.teacher=ema"],
            "distill.teacher: found ema with update.tensor_parallel_size above 1, expected live",
        ),
        (["--distill.top_k=50"], "distill.top_k: found 50"),
        (["--distill.divergence=mse"], "distill.divergence: found mse"),
        (["--distill.target=shuffled_vocabulary"], "distill.target: found shuffled_vocabulary"),
        (["--rollout.engine=vllm"], "rollout.vllm.publish: found auto .* expected gather"),
        (
            ["--rollout.engine=vllm", "--rollout.vllm.publish=gather", "--rollout.vllm.placement=colocated"],
            "rollout.vllm.placement: found colocated .* expected process or server",
        ),
    ],
)
def test_what_tensor_parallelism_cannot_do_is_refused(arguments, message):
    required = [
        "--run_dir=r",
        "--model.path=m",
        "--data.train=q",
        "--retriever.corpus=c",
        "--distill.measure_every=0",
    ]
    with pytest.raises(ConfigError, match=message):
        load([*required, "--update.tensor_parallel_size=2", *arguments])


def test_models_that_cannot_be_cut_are_refused(tmp_path):
    path = write_model(tmp_path / "model")
    with pytest.raises(
        ConfigError,
        match="update.tensor_parallel_size: found 2 for 1 ranks, expected a divisor of their number",
    ):
        make_policy(make_config(path, update={"tensor_parallel_size": 2}), join_world())
    model = AutoModelForCausalLM.from_pretrained(path)
    check_model(model, UpdateConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="update.tensor_parallel_size: found 4 .*'num_key_value_heads': 2"):
        check_model(model, UpdateConfig(tensor_parallel_size=4))
    model.base_model.layers[0].mlp.router = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"found 2 for a model with layers \['router'\]"):
        check_model(model, UpdateConfig(tensor_parallel_size=2))


def test_a_run_resumes_with_the_same_parts_only(tmp_path):
    plain, split = (
        run_identity(
            make_config(tmp_path, update={"tensor_parallel_size": size, "sequence_parallel_size": 4 // size}),
            "c",
        )
        for size in (1, 2)
    )
    assert plain["update.tensor_parallel_size"] == 1 and split == plain | {"update.tensor_parallel_size": 2}
