"""The policy under real DeepSpeed, a world of one."""

import dataclasses
import math

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.building.policy import head_options
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.training.clipped_adamw import ClippedAdamW
from megatron_sd.training.deepspeed_config import deepspeed_config
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.placement import largest_layer
from megatron_sd.training.policy_module import PolicyModule
from megatron_sd.training.start_policy import load_for_training
from tests.rank_programs import update_steps
from tests.rank_programs.update_steps import Order, batch_of, full_parameters, take_steps
from tests.training.fakes import make_config, make_policy, make_samples, write_model
from tests.training.same_steps import assert_same_moments, assert_same_movement, assert_same_steps, joined

ONE_MICROBATCH = 100_000


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("policy") / "model")


def outcome(world, model_path, **fields):
    return take_steps(Order(model=str(model_path), **fields), world)


def assert_same(found, expected):
    for one, other in zip(found["history"], expected["history"], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-5, abs=2e-6), name
    assert_same_steps([found], [expected])


@pytest.fixture(scope="module")
def expected(world, model_path):
    return outcome(world, model_path, max_tokens=ONE_MICROBATCH)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_is_adamw_on_the_clipped_gradient(world, tmp_path, family, gradient_checkpointing):
    """The same two steps by plain torch, from the policy module's own gradient."""
    model_path = write_model(tmp_path / "model", family=family)
    expected = outcome(
        world,
        model_path,
        max_tokens=ONE_MICROBATCH,
        config={"model": {"gradient_checkpointing": gradient_checkpointing}},
    )
    config = make_config(model_path)
    module = PolicyModule(
        load_for_training(config.model), head_options(config), config.policy_loss, config.distill
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    batch = batch_of(Order(model="", max_tokens=ONE_MICROBATCH), world, "token")
    for step in range(2):
        module.zero_grad()
        weights = TermWeights(policy=1.0, distill_spread=0.5, distill_no_spread=0.5)
        loss, _ = module(
            DeviceMicrobatch.of(batch.microbatches[0], world.device), batch.totals, weights, None
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        assert expected["history"][step]["grad_norm"] == pytest.approx(norm.item(), rel=2e-6)
        optimizer.step()
    found = {name: parameter.detach() for name, parameter in module.model.named_parameters()}
    assert_same_movement(found, expected["parameters"], expected["start"])
    moments = {
        name: optimizer.state[parameter]["exp_avg"] for name, parameter in module.model.named_parameters()
    }
    assert_same_moments(moments, joined([expected["moments"]]))


def test_a_rollout_left_out_is_no_rounding(world, model_path, expected):
    """What the comparison of steps would be worth nothing without."""
    fewer = outcome(world, model_path, max_tokens=ONE_MICROBATCH, only=list(range(15)))
    with pytest.raises(AssertionError, match="apart after a movement of"):
        assert_same_movement(fewer["parameters"], expected["parameters"], expected["start"])
    with pytest.raises(AssertionError, match="moments of norm"):
        assert_same_moments(joined([fewer["moments"]]), joined([expected["moments"]]))


def test_accumulation_and_order_change_nothing(world, model_path, expected):
    many = outcome(world, model_path, max_tokens=40, reverse=True)
    assert len(many["rows"]) >= 8 and len(expected["rows"]) == 1
    assert_same(many, expected)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_takes_the_same_steps(world, model_path, stage):
    distill = {"measure_every": 0}
    sharded = outcome(world, model_path, config={"distill": distill})
    assert_same(
        outcome(world, model_path, config={"distill": distill, "update": {"zero_stage": stage}}), sharded
    )


def test_untied_head(world, tmp_path):
    path = write_model(tmp_path / "model", tied=False)
    one, other = outcome(world, path, max_tokens=ONE_MICROBATCH), outcome(world, path, max_tokens=60)
    assert "lm_head.weight" in one["parameters"]
    assert_same(one, other)


def test_kl_to_the_start_policy(world, model_path):
    """Zero at the first step, positive after it; the reference stays where it was, at stage 3 and below."""
    sharded = outcome(world, model_path, steps=3, config={"kl_weight": 0.1})
    kls = [metrics["loss/kl"] for metrics in sharded["history"]]
    assert kls[0] == pytest.approx(0.0, abs=1e-9) and 1e-4 < kls[1] < kls[2]
    config = {"kl_weight": 0.1, "update": {"zero_stage": 1}, "distill": {"measure_every": 0}}
    whole = outcome(world, model_path, steps=3, config=config)
    assert [m["loss/kl"] for m in whole["history"]] == pytest.approx(kls, rel=1e-4, abs=1e-9)


def test_block_none_is_grpo_bit_for_bit(world, model_path, monkeypatch):
    """No teacher prompts, or no distillation at all: the same parameters, to the bit, at measuring
    steps too."""

    def without_teachers(num, **options):
        return [dataclasses.replace(s, teacher_prompt_ids=None) for s in make_samples(num, **options)]

    grpo = outcome(world, model_path, steps=3, config={"distill": {"block": "none"}})
    monkeypatch.setattr(update_steps, "make_samples", without_teachers)
    empty_blocks = outcome(world, model_path, steps=3, config={"distill": {"measure_every": 0}})
    plain = outcome(world, model_path, steps=3, config={"distill": {"block": "none"}})
    for other in (plain, empty_blocks):
        assert all(
            torch.equal(other["parameters"][name], plain["parameters"][name]) for name in plain["parameters"]
        )
    assert_same_steps([grpo], [plain])  # packed for a teacher that never runs: equal up to rounding


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]),
        ({"schedule": "linear", "final_ratio": 0.2}, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 0.6e-3, 0.2e-3]),
    ],
)
def test_the_learning_rate_of_each_step_and_the_version(world, model_path, fields, expected):
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 4} | fields
    policy = make_policy(make_config(model_path, optimizer=optimizer, num_steps=6), world)
    batch = batch_of(Order(model="", max_tokens=ONE_MICROBATCH), world, "token")
    rates = []
    for _ in range(6):
        policy.accumulate(
            batch.microbatches[0],
            batch.totals,
            TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0),
        )
        rates.append(policy.step().learning_rate)
        assert {group["lr"] for group in policy.engine.optimizer.param_groups} == {rates[-1]}
    assert rates == pytest.approx(expected)
    assert policy.version == 6


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_is_refused_and_forgotten(world, model_path, stage):
    """The refused step leaves no trace: the next one is the first."""
    config = {"update": {"zero_stage": stage}, "distill": {"measure_every": 0}}
    found = outcome(world, model_path, steps=3, config=config, poison={"1": 0})
    assert found["version"] == 2
    assert len(found["errors"]) == 1
    assert (
        "NonFiniteError: the loss of rank 0 is not finite at step 1: no rank took the optimiser step"
        in found["errors"][0]
    )
    expected = outcome(world, model_path, steps=2, config=config)
    assert_same(found, expected)
    assert all(
        torch.equal(found["parameters"][name], parameter)
        for name, parameter in expected["parameters"].items()
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradient_under_a_finite_loss(world, model_path, stage):
    policy = make_policy(make_config(model_path, update={"zero_stage": stage}), world)
    before = {name: tensor.clone() for name, tensor in full_parameters(policy).items()}
    batch = batch_of(Order(model="", max_tokens=ONE_MICROBATCH), world, "token")
    grpo = TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)

    def spoil_gradient(_module, _args, output):
        output.register_hook(lambda gradient: gradient * math.inf)

    handle = policy.model.base_model.norm.register_forward_hook(spoil_gradient)
    policy.accumulate(batch.microbatches[0], batch.totals, grpo)
    handle.remove()
    with pytest.raises(
        Exception, match="the gradient of (rank 0|the average over ranks) is not finite at step 0"
    ):
        policy.step()
    assert policy.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in full_parameters(policy).items())
    policy.accumulate(batch.microbatches[0], batch.totals, grpo)
    assert math.isfinite(policy.step().grad_norm)


def test_nothing_to_train_on_moves_nothing(world, model_path):
    found = outcome(world, model_path, num_samples=0, steps=1)
    assert found["errors"] == [] and found["history"][0]["grad_norm"] == 0
    start = full_parameters(make_policy(make_config(model_path), world))
    assert all(torch.equal(found["parameters"][name], start[name]) for name in start)


def test_bfloat16_keeps_float32_masters(world, model_path):
    """Steps too small for bfloat16 add up."""
    found = outcome(
        world,
        model_path,
        steps=2,
        config={"model": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-5}},
    )
    exact = outcome(world, model_path, steps=2, config={"optimizer": {"learning_rate": 1e-5}})
    assert {p.dtype for p in found["parameters"].values()} == {torch.bfloat16}
    assert found["history"][0]["loss/policy"] == pytest.approx(exact["history"][0]["loss/policy"], rel=0.02)
    assert found["history"][0]["loss/distill"] == pytest.approx(exact["history"][0]["loss/distill"], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_weights_are_their_own_masters(world, model_path, dtype):
    """ZeRO-3 would keep the same numbers twice."""
    optimizer = make_policy(make_config(model_path, model={"dtype": dtype}), world).engine.optimizer
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    assert [master.data_ptr() == shard.data_ptr() for master, shard in pairs] == [dtype == "float32"]


def test_stepping_over_small_groups_changes_nothing(world, model_path, expected, tmp_path, monkeypatch):
    """Many sub-groups, as large models have: the same steps, and a checkpoint that either reads."""
    kept = {"max_tokens": ONE_MICROBATCH, "checkpoint": str(tmp_path)}
    monkeypatch.setattr("megatron_sd.training.deepspeed_config.SUB_GROUP_ELEMENTS", 1000)
    found = outcome(world, model_path, **kept)
    optimizer = make_policy(make_config(model_path), world).engine.optimizer
    assert len(optimizer.fp32_partitioned_groups_flat) > 5
    assert_same(found, expected)
    monkeypatch.undo()
    resumed = outcome(world, model_path, **kept)
    assert all(torch.equal(resumed["parameters"][name], value) for name, value in found["parameters"].items())


def test_settings_that_do_not_fit(world, model_path):
    with pytest.raises(ConfigError, match="zero_stage 0 keeps no float32 master"):
        make_policy(make_config(model_path, model={"dtype": "bfloat16"}, update={"zero_stage": 0}), world)
    policy = make_policy(make_config(model_path, update={"zero_stage": 1}), world)
    with pytest.raises(
        ConfigError, match="update.zero_stage is 1, and the gradient ratio can be measured at stage 3 only"
    ):
        policy.local_gradients()


def test_deepspeed_config_is_ours_alone(model_path):
    config = make_config(model_path)
    found = deepspeed_config(
        config.update, config.optimizer, dtype=config.model.dtype, world_size=2, device_type="cpu", layer=9
    )
    assert found["managed_gradient_accumulation"] is False
    assert (found["gradient_clipping"], found["zero_optimization"]["stage"], found["train_batch_size"]) == (
        1.0,
        3,
        2,
    )
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize("layer", [7_000_000, 233_000_000, 878_000_000])  # of 0.5B, 7B and 72B models
def test_between_gpus_whole_layers_travel_while_others_compute(model_path, layer):
    config = make_config(model_path)
    zero = {
        device: deepspeed_config(
            config.update, config.optimizer, dtype="bfloat16", world_size=8, device_type=device, layer=layer
        )["zero_optimization"]
        for device in ("cuda", "cpu")
    }
    assert [zero[device]["overlap_comm"] for device in ("cuda", "cpu")] == [True, False]
    assert zero["cuda"]["stage3_prefetch_bucket_size"] >= 1.2 * layer
    assert zero["cuda"]["stage3_max_live_parameters"] >= 3 * layer
    assert zero["cuda"]["reduce_bucket_size"] >= layer
    assert zero["cuda"]["stage3_max_reuse_distance"] == 1_000_000_000
    assert zero["cpu"]["reduce_bucket_size"] == 8_000_000
    kept = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    assert [zero["cpu"][key] for key in kept] == [3 * layer, min(3 * layer, 1_000_000_000)]


def test_the_largest_layer_is_counted_whole_and_in_shards(world, model_path):
    config = make_config(model_path)
    model = load_for_training(config.model)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert largest_layer(model) == layer > 0
    assert largest_layer(make_policy(config, world).model) == layer


def test_clipped_adamw_skips_what_is_not_finite():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = ClippedAdamW([parameter], max_grad_norm=1.0, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    parameter.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert optimizer.overflow and parameter.tolist() == [1.0] * 4
    parameter.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert not optimizer.overflow and optimizer._global_grad_norm == pytest.approx(6.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_layers_called_by_keyword_are_refused(world, model_path):
    """ZeRO-3 would reduce their gradients before they are complete."""
    policy = make_policy(make_config(model_path), world)
    with pytest.raises(DataError, match="Qwen2DecoderLayer gets its hidden states by keyword"):
        policy.model.base_model.layers[0](hidden_states=torch.zeros(1, 2, 32))


@pytest.mark.parametrize("stage", [2, 3])
def test_zero3s_linear_serves_the_update_alone(world, model_path, stage, monkeypatch):
    """Everywhere else, in the rollout engine above all, torch's own is faster."""
    plain, seen = torch.nn.functional.linear, []
    policy = make_policy(make_config(model_path, update={"zero_stage": stage}), world)
    forward = PolicyModule.forward

    def watched(*arguments, **keywords):
        seen.append(torch.nn.functional.linear)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(PolicyModule, "forward", watched)
    batch = batch_of(Order(model="", max_tokens=ONE_MICROBATCH), world, "token")
    policy.accumulate(
        batch.microbatches[0],
        batch.totals,
        TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0),
    )
    assert seen == [zero3_linear_wrap if stage == 3 else plain]
    assert torch.nn.functional.linear is plain
