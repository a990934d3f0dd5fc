"""The planner's arithmetic against what models really take, and what it prints."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from launch.cli import main as command_line
from launch.cluster.layout import LayoutConfig
from launch.planner.estimate import BLANKS, PlanConfig, planned_job
from launch.planner.gpus import GPUS, find_gpu
from launch.planner.memory import Sizes, checkpoint_bytes, peak, rank_memory, saved_bytes_per_token
from launch.planner.models import model_config
from launch.planner.step_estimate import step_plan
from megatron_sd.config import Config
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.resharding.names import DecoderSizes, model_shape
from tests.nursery import run_ranks
from tests.training.fakes import write_model

LIMIT_S = 400
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32_768,
}
PATHS = {"run_dir": "none", "data.train": "none", "retriever.corpus": "none"}
REQUIRED = PATHS | {"model.dtype": "float32", "policy_loss.kl_weight": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """34 million parameters."""
    return write_model(tmp_path_factory.mktemp("plan") / "model", **SHAPE, max_position_embeddings=2048)


def run_config(model: str, options: Sequence[str]) -> Config:
    return planned_job(PlanConfig(model=model), options, BLANKS).config


def measured(model: Path, *options: str, num_samples: int, num_ranks: int = 1) -> dict[str, int]:
    """Bytes of the worst rank in update and step; sequences of 512 tokens."""
    output = model.parent / "measured"
    required = (f"--{key}={value}" for key, value in REQUIRED.items())
    argv = [str(model), str(output), str(num_samples), "512", *options, *required]
    run_ranks("tests.rank_programs.measure_memory:main", argv, ranks=num_ranks, limit_s=LIMIT_S)
    ranks = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(num_ranks)]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def planned(model: Path, *options: str, tokens: int, num_ranks: int = 1) -> dict[str, float]:
    """The same from the planner, without the engine, which is not there."""
    given = REQUIRED | {"model.path": model, "update.max_microbatch_tokens": tokens}
    config = load([*(f"--{key}={value}" for key, value in given.items()), *options])
    parts = rank_memory(model_shape(model_config(str(model))), config, world_size=num_ranks, on_gpu=False)
    parts = [part for part in parts if not part.name.startswith("embedded engine")]
    phases = {"update": {"head", "backward", "reduce"}, "step": {"step"}}
    return {
        name: max(
            peak([part for part in parts if not part.phases or moment in part.phases])[0] for moment in moments
        )
        for name, moments in phases.items()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("options", "num_samples", "num_ranks"),
    [
        ((), 4, 1),
        (("--model.gradient_checkpointing=true",), 4, 1),
        ((), 4, 2),
        (("--model.lora.rank=8",), 4, 1),
        (("--advantage.estimator=gae",), 4, 1),
        (("--advantage.estimator=gae",), 4, 2),
    ],
)
def test_memory_is_within_15_percent_of_what_is_measured(model, options, num_samples, num_ranks):
    """Of the worst moment; a moment that takes a third of it differs by more, by what the process itself
    grows."""
    found = measured(model, *options, num_samples=num_samples, num_ranks=num_ranks)
    expected = planned(model, *options, tokens=512 * num_samples // num_ranks, num_ranks=num_ranks)
    if "critic" in found:  # it works while the policy rests, which the planner takes for the greater moment
        found["update"] = max(found["update"], found.pop("critic"))
    print(
        {
            name: f"planned {expected[name] / 2**30:.2f} GiB, measured {found[name] / 2**30:.2f}"
            for name in found
        }
    )
    assert expected == pytest.approx(found, rel=0.15, abs=0.15 * max(found.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_activations_are_what_autograd_keeps(dtype, kv_heads):
    """Bytes of every tensor that a layer saves and that is no parameter, each storage once."""
    tokens, kept = 48, []
    for num_layers in (1, 2):
        sizes = SHAPE | {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 8,
            "num_key_value_heads": kv_heads,
        }
        model = (
            Qwen2Model(Qwen2Config(**sizes | {"num_hidden_layers": num_layers, "vocab_size": 50}))
            .to(dtype)
            .train()
        )
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor, own=own, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    shape = DecoderSizes(
        num_layers=1,
        hidden=64,
        intermediate=160,
        num_heads=8,
        num_kv_heads=kv_heads,
        head_dim=8,
        vocabulary=50,
        tied=True,
    )
    assert (kept[1] - kept[0]) / tokens == pytest.approx(
        saved_bytes_per_token(shape, dtype.itemsize), rel=0.01
    )


def test_sizes_are_those_of_the_model(model):
    from transformers import AutoModelForCausalLM

    expected = sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters()
    )
    assert Sizes.of(model_shape(model_config(str(model)))).total == expected


def test_offloading_and_sharding_take_from_the_device_what_they_should():
    model = model_shape(model_config("qwen2.5-7b"))

    def states(*options: str, world_size: int = 8, where: str = "device") -> float:
        parts = rank_memory(model, run_config("qwen2.5-7b", options), world_size=world_size)
        return sum(part.num_bytes for part in parts if not part.phases and part.where == where)

    own = Sizes.of(model).total / 8
    assert states() - states("--update.offload_optimizer=cpu") == pytest.approx(12 * own, rel=1e-6)
    assert states("--update.offload_optimizer=cpu", where="host") == pytest.approx(12 * own, rel=1e-6)
    assert states("--policy_loss.kl_weight=0") == pytest.approx(states() - 2 * own, rel=1e-6)
    assert states("--model.lora.rank=16") < states() / 3


def test_a_teacher_with_weights_of_its_own_is_counted():
    """Of the policy's size, with a float32 average where it is one; or of another model's."""
    model = model_shape(model_config("qwen2.5-7b"))

    def teacher(*options: str, stage: int = 3) -> float:
        config = run_config(
            "qwen2.5-7b", ["--distill.measure_every=0", *options, f"--update.zero_stage={stage}"]
        )
        parts = rank_memory(model, config, world_size=8)
        return sum(part.num_bytes for part in parts if part.name.startswith("teacher"))

    own = Sizes.of(model).total / 8
    assert teacher() == teacher("--distill.block=none", "--distill.teacher=frozen") == 0
    assert teacher("--distill.teacher=frozen") == pytest.approx(2 * own, rel=1e-6)
    assert teacher("--distill.teacher=frozen", stage=2) == pytest.approx(16 * own, rel=1e-6)
    assert teacher("--distill.teacher=ema") == pytest.approx(6 * own, rel=1e-6)
    larger = ("--distill.teacher=other", "--distill.teacher_path=models/Qwen2.5-72B")
    total = Sizes.of(model_shape(model_config("qwen2.5-72b"))).total
    assert teacher(*larger) == pytest.approx(2 * total / 8, rel=1e-6)

    def products(*options: str) -> float:
        layout, gpu = LayoutConfig(cluster="slurm", nodes=1), find_gpu("H100")
        config = run_config("qwen2.5-7b", options)
        return step_plan(layout, config, model_config("qwen2.5-7b"), gpu).seconds["update: products"]

    student, read = products("--distill.block=none"), products("--distill.teacher=frozen")
    assert products(*larger) - student == pytest.approx(
        (read - student) * total / Sizes.of(model).total, rel=1e-6
    )


def test_a_critic_is_counted():
    """A second model without its output embedding, with masters, moments and gradients; one more forward than
    the policy; and its part of a checkpoint."""
    model = model_shape(model_config("qwen2.5-7b"))
    ppo = ("--advantage.estimator=gae", "--distill.block=none")
    whole = Sizes.of(model)
    total = whole.total - whole.embedding + model.hidden + 1

    def config(*options: str):
        return run_config("qwen2.5-7b", ["--distill.measure_every=0", *options])

    def critic(*options: str) -> float:
        parts = rank_memory(model, config(*options), world_size=8)
        kept = [part for part in parts if part.name.startswith("critic") and "bucket" not in part.name]
        return sum(part.num_bytes for part in kept)

    assert critic() == 0
    assert critic(*ppo) == pytest.approx((2 + 4 + 8 + 4) * total / 8, rel=1e-6)
    at_stage_1 = critic(*ppo, "--update.zero_stage=1")
    assert at_stage_1 == pytest.approx((2 + 4) * total + (4 + 8) * total / 8, rel=1e-6)
    other = critic(*ppo, "--critic.path=models/Qwen2.5-0.5B")
    assert other < critic(*ppo) / 10
    more = checkpoint_bytes(model, config(*ppo)) - checkpoint_bytes(model, config())
    assert more == pytest.approx(12 * total)

    def seconds(*options: str):
        layout, gpu = LayoutConfig(cluster="slurm", nodes=1), find_gpu("H100")
        return step_plan(layout, config(*options), model_config("qwen2.5-7b"), gpu).seconds

    plain, with_critic = seconds("--distill.block=none"), seconds(*ppo)
    ratio = with_critic["update: products"] / plain["update: products"]
    passes = 3 + 1 + 1  # forward, twice of it backward, again under checkpointing, and the start policy
    # the policy is read once more, too, before the first update
    assert ratio == pytest.approx(((passes + 1) * whole.total + 5 * total) / (passes * whole.total), rel=1e-6)
    moved = [sum(v for name, v in s.items() if "communication" in name) for s in (plain, with_critic)]
    # gathered for the student twice and for the start policy, and reduced once; read once more; the critic four times
    assert moved[1] / moved[0] == pytest.approx((5 * whole.total + 4 * total) / (4 * whole.total), rel=1e-6)


def test_a_checkpoint_in_the_background_is_counted_in_host_memory():
    model = model_shape(model_config("qwen2.5-7b"))
    plain, copied = (
        rank_memory(model, run_config("qwen2.5-7b", options), world_size=8)
        for options in ([], ["--checkpoint.background=true"])
    )
    assert peak(copied)[0] == peak(plain)[0]
    total = Sizes.of(model).total
    assert peak(copied, "host")[0] - peak(plain, "host")[0] == pytest.approx(14 * total / 8, rel=1e-6)


LOADING = "loading           18.2 GB read a node (each rank its own elements), 9.1 s at 2 GB/s"

WITH_AUTOTP = ("--update.tensor_parallel_size=2", "--rollout.vllm.publish=gather")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--publish.wire", "nccl"], "device"),
        (["--publish.wire", "gloo"], "host"),
        (["--publish.wire", "shared_memory"], None),
        (["--rollout.vllm.publish", "gather"], None),
        (["--publish.changes_only", "false"], None),
    ],
)
def test_what_a_rank_keeps_of_the_last_publish_is_counted(options, where):
    model = model_shape(model_config("qwen2.5-7b"))
    own = ["--rollout.engine", "vllm", "--publish.changes_only", "true", *options]
    parts = rank_memory(model, run_config("qwen2.5-7b", own), world_size=8)
    found = [(part.num_bytes, part.where) for part in parts if part.name == "publish: what the workers hold"]
    assert found == ([] if where is None else [(2 * math.ceil(Sizes.of(model).total / 8), where)])


def test_the_plan_of_a_large_model(capsys):
    assert (
        command_line(
            ["plan", "--model", "qwen2.5-72b", "--gpus", "64", "--rollout.vllm.tensor_parallel_size", "8"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    publish = "publish           145.4 GB a step"
    for fragment in ("72.71 G parameters", "64 training ranks on 8 nodes", "fits in 79.1", publish, LOADING):
        assert fragment in printed, printed
    assert "update.max_microbatch_tokens 16,384; the largest power of two that fits: 16,384" in printed, (
        printed
    )
    assert command_line(["plan", "--model", "qwen2.5-72b", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "the largest power of two that fits: none" in printed
    assert command_line(["plan", "--model", "qwen2.5-7b", "--gpus", "8", *WITH_AUTOTP]) == 0
    whole = (
        "loading           15.2 GB read a node (every rank loads the whole model, of pages that they share)"
    )
    assert whole in capsys.readouterr().out


def test_ranks_that_are_the_engine_have_it_while_they_sample():
    """Half of the weights of 7.6 G parameters in bfloat16 and 20 GiB of keys and values, and the weights in
    host memory."""
    options = [
        "--rollout.engine=vllm",
        "--rollout.vllm.placement=colocated",
        "--rollout.vllm.tensor_parallel_size=2",
    ]
    options += ["--rollout.vllm.kv_cache_gib=20"]
    model = model_shape(model_config("qwen2.5-7b"))
    parts = [
        p
        for p in rank_memory(model, run_config("qwen2.5-7b", options), world_size=8)
        if p.name.startswith("vLLM")
    ]
    assert [(part.where, part.phases) for part in parts] == [("device", ("rollout",))] * 2 + [("host", ())]
    assert [part.num_bytes / 2**30 for part in parts] == pytest.approx([7.1, 20.0, 7.1], abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=qwen2.5-72b", "--gpus=64", "--gpu=v100"],
            "gpu: found 'v100', expected one of rtx4090, l40s",
        ),
        (["--model=qwen9", "--gpus=64"], "model qwen9: found neither"),
        (["--model=qwen2.5-72b", "--gpus=12"], "gpus: found 12, expected a multiple of gpus_per_node 8"),
        (["--model=qwen2.5-72b", "--gpus=0"], "expected 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments, message, capsys):
    assert command_line(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_twice_the_gpus_halve_the_products_and_distilling_costs_a_reading():
    model, gpu = model_config("qwen2.5-7b"), find_gpu("H100")

    def plan(nodes: int, *options: str):
        return step_plan(
            LayoutConfig(cluster="slurm", nodes=nodes), run_config("qwen2.5-7b", options), model, gpu
        )

    assert plan(2).seconds["update: products"] == pytest.approx(plan(1).seconds["update: products"] / 2)
    grpo = plan(1, "--distill.block=none")
    assert grpo.teacher_tokens == 0 and plan(1).teacher_tokens > grpo.rollout_tokens
    assert plan(1).seconds["update: products"] / grpo.seconds["update: products"] == pytest.approx(
        1.2, abs=0.03
    )


def test_an_unknown_gpu_is_refused():
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(ConfigError, match="did you mean a100-80"):
        find_gpu("a100-8")
