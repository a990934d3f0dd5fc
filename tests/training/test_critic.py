"""The critic under real DeepSpeed: its gradient, its steps at every ZeRO stage, what a checkpoint holds of
it; two ranks against one."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from megatron_sd.building.policy import build_critic
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import CheckpointError, NonFiniteError
from megatron_sd.records import UpdateResult
from megatron_sd.training.critic.value_module import ValueModule
from megatron_sd.training.start_policy import load_for_training
from tests.launched import LIMIT_S
from tests.nursery import run_ranks
from tests.rank_programs.critic_steps import (
    CriticOrder,
    batch_of,
    configured,
    parameters_of,
    read_anew,
    take_critic_steps,
)
from tests.training.fakes import write_model
from tests.training.same_steps import assert_same_movement

LARGE = {"learning_rate": 3e-2, "warmup_steps": 0}  # a critic that soon says something
PLAIN = {"measure_every": 0}


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("critic") / "model", tied=False))


@pytest.fixture(scope="module")
def sharded(world, model_path):
    return take_critic_steps(CriticOrder(model=model_path), world)


def built(order, world):
    config = configured(order)
    return build_critic(config, Parallel.of(config.update, world))


def values_by_hand(model, weight, bias, microbatch):
    """A sequence at a time, from transformers' own hidden states, without padding."""
    found = []
    width = microbatch.input_ids.shape[1]
    for number, length in enumerate(microbatch.lengths):
        ids = torch.from_numpy(microbatch.input_ids[number : number + 1, :length])
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        rows = microbatch.row_index[microbatch.row_index // width == number] % width
        found.append(hidden[rows] @ weight + bias)
    return torch.cat(found)


def test_an_untrained_critic_expects_nothing(world, model_path):
    critic = built(CriticOrder(model=model_path), world)
    assert "lm_head.weight" in dict(critic.model.named_parameters())
    for microbatch in batch_of(CriticOrder(model=model_path), world):
        values = critic.read(microbatch)["values"]
        assert values.dtype == np.float32 and values.tolist() == [0.0] * len(microbatch.row_index)


def test_a_critic_may_start_elsewhere(world, model_path, tmp_path):
    other = write_model(tmp_path / "other", tied=True, seed=7)
    critic = built(CriticOrder(model=model_path, critic={"path": str(other)}), world)
    stored = load_file(other / "model.safetensors")
    own = parameters_of(critic)
    assert own.keys() - {"lm_head.weight", "lm_head.bias"} == stored.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_gradient_is_autograds_in_float64(world, model_path, gradient_checkpointing):
    """Of a critic that has taken steps, on returns and old values that it does not agree with any more."""
    config = {"model": {"gradient_checkpointing": gradient_checkpointing}, "distill": PLAIN}
    order = CriticOrder(model=model_path, critic=LARGE, config=config)
    critic = built(order, world)
    batch = read_anew(critic, batch_of(order, world), world)
    for _ in range(2):
        for microbatch in batch:
            critic.accumulate(microbatch, batch.totals)
        critic.step()
    for microbatch in batch:
        critic.accumulate(microbatch, batch.totals)
    named = {name: parameter for name, parameter in critic.model.named_parameters()}
    found = {name: safe_get_full_grad(parameter) for name, parameter in named.items()}

    own = parameters_of(critic)
    weight, bias = (own.pop(f"lm_head.{name}").double().requires_grad_() for name in ("weight", "bias"))
    model = load_for_training(configured(order).model).double()
    model.set_output_embeddings(torch.nn.Identity())
    model.load_state_dict({name: tensor.double() for name, tensor in own.items()})
    model.gradient_checkpointing_disable()
    loss = 0.0
    for m in batch:
        returns, old = (torch.from_numpy(column).double() for column in (m.returns, m.old_values))
        values = values_by_hand(model, weight, bias, m)
        bounded = torch.where((values - old).abs() > 0.5, old + 0.5 * (values - old).sign(), values)
        squares = torch.stack([(values - returns) ** 2, (bounded - returns) ** 2]).max(0).values
        loss = loss + 0.5 * squares.sum() / batch.totals.policy_weight
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected |= {"lm_head.weight": weight.grad, "lm_head.bias": bias.grad}
    assert found.keys() == expected.keys()
    whole = sum(gradient.norm().item() ** 2 for gradient in expected.values()) ** 0.5
    assert whole > 1e-2 and expected["model.embed_tokens.weight"].norm() > 1e-3 * whole
    for name, gradient in expected.items():
        apart = (found[name].double() - gradient).norm().item()
        assert apart <= 1e-4 * gradient.norm().item() + 1e-6 * whole, name


def test_a_step_reports_what_it_did(sharded):
    assert sharded["version"] == 3 and sharded["updates"] == 3 and len(sharded["rows"]) > 3
    first = sharded["history"][0]
    assert first["critic/learning_rate"] == pytest.approx(5e-4) and first["critic/clipped"] == 0.0
    assert first["critic/explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert (first["optim/grad_norm"], first["optim/learning_rate"], first["loss/policy"]) == (1.0, 2.0, 3.0)
    losses = [metrics["critic/loss"] for metrics in sharded["history"]]
    assert losses[0] > losses[1] > losses[2] and first["critic/grad_norm"] > 0.0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_takes_the_critics_steps(world, model_path, sharded, stage):
    config = {"distill": PLAIN, "update": {"zero_stage": stage}}
    found = take_critic_steps(CriticOrder(model=model_path, config=config), world)
    for one, other in zip(found["history"], sharded["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert_same_movement(found["parameters"], sharded["parameters"], sharded["start"])


@pytest.mark.slow
def test_the_policy_waits_for_the_critic(world, model_path):
    found = take_critic_steps(CriticOrder(model=model_path, critic={"warmup_only_steps": 2}), world)
    assert found["updates"] == 1 and found["version"] == 3
    assert [metrics["optim/learning_rate"] for metrics in found["history"]] == [0.0, 0.0, 2.0]


def test_adapters_are_the_policys_alone(world, model_path):
    critic = built(CriticOrder(model=model_path, config={"model": {"lora": {"rank": 2}}}), world)
    assert all(parameter.requires_grad for parameter in critic.model.parameters())
    assert not [name for name, _ in critic.model.named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    "stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_critic_that_goes_on_is_bit_identical(world, model_path, tmp_path, stage):
    plain = CriticOrder(model=model_path, steps=4, config={"distill": PLAIN, "update": {"zero_stage": stage}})
    expected = take_critic_steps(plain, world)
    half = take_critic_steps(dataclasses.replace(plain, steps=2, save=str(tmp_path)), world)
    rest = take_critic_steps(dataclasses.replace(plain, first=2, load=str(tmp_path)), world)
    assert half["history"] + rest["history"] == expected["history"] and rest["version"] == 4
    for name, parameter in expected["parameters"].items():
        assert torch.equal(rest["parameters"][name], parameter), name


def test_a_checkpoint_without_a_critic_is_refused(world, model_path, tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no critic, expected the one that advantage.estimator gae"
    ):
        built(CriticOrder(model=model_path), world).read_state(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_gradient_that_is_not_finite_leaves_the_critic(world, model_path, stage):
    order = CriticOrder(
        model=model_path, config={"distill": PLAIN, "update": {"zero_stage": stage}}, critic=LARGE
    )
    critic = built(order, world)
    before = parameters_of(critic)
    batch = read_anew(critic, batch_of(order, world), world)
    poisoned = copy.deepcopy(batch)
    poisoned.microbatches[0].returns[:] = float("nan")
    with pytest.raises(NonFiniteError, match="the critic's gradient is not finite at its step 0"):
        critic.learn(poisoned, lambda own: UpdateResult(grad_norm=1.0, learning_rate=1.0), 0)
    assert critic.version == 0
    after = parameters_of(critic)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fresh = built(order, world)
    for one in (critic, fresh):
        for microbatch in batch:
            one.accumulate(microbatch, batch.totals)
        one.step()
    again, expected = parameters_of(critic), parameters_of(fresh)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_take_the_critics_steps_and_go_on_with_ones(world, model_path, sharded, tmp_path):
    """At stage 3 and 1; a rank without rows; and from a checkpoint that one rank wrote."""
    one = dataclasses.replace(CriticOrder(model=model_path), steps=2, save=str(tmp_path / "one"))
    take_critic_steps(one, world)
    stage_1 = {"distill": PLAIN, "update": {"zero_stage": 1}}
    orders = {
        "steps": {},
        "stage_1": {"config": stage_1},
        "one_sample": {"only": [3]},
        "rest": {"first": 2, "load": str(tmp_path / "one")},
    }
    work = [
        {"model": model_path, "output": str(tmp_path / name), **fields} for name, fields in orders.items()
    ]
    run_ranks("tests.rank_programs.critic_steps:run", json.dumps(work), ranks=2, limit_s=LIMIT_S)
    found = {name: [torch.load(tmp_path / f"{name}.{rank}") for rank in (0, 1)] for name in orders}
    alone = take_critic_steps(CriticOrder(model=model_path, only=[3]), world)
    assert 0 in (sum(found["one_sample"][rank]["rows"]) for rank in (0, 1))
    for name, expected in {"steps": sharded, "stage_1": sharded, "one_sample": alone}.items():
        first, second = found[name]
        assert first["history"] == second["history"]
        for two, metrics in zip(first["history"], expected["history"], strict=True):
            assert two == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert_same_movement(first["parameters"], expected["parameters"], expected["start"])
    assert_same_movement(found["rest"][0]["parameters"], sharded["parameters"], sharded["start"])
    assert found["rest"][1]["version"] == 3


def test_the_head_takes_the_place_of_the_output_embedding(model_path):
    module = ValueModule(load_for_training(configured(CriticOrder(model=model_path)).model))
    shapes = {name: tuple(p.shape) for name, p in module.model.named_parameters() if "lm_head" in name}
    assert shapes == {"lm_head.weight": (32,), "lm_head.bias": (1,)}
