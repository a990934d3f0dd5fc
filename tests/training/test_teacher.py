"""Teachers with weights of their own: the start policy's stay, an average follows, and both read what the
live teacher reads."""

import dataclasses
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.building.policy import check_same_tokens
from megatron_sd.config import AdvantageConfig, CriticConfig, DistillConfig
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import CheckpointError, ConfigError, DataError
from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.search.tokens import load_codec
from megatron_sd.training.state.tensor_file import write_tensors
from megatron_sd.training.teacher_side.teacher import TEACHERS
from tests.ops.divergences import JSD
from tests.rank_programs.update_steps import Order, batch_of, take_steps
from tests.training.fakes import make_config, make_policy, make_samples, write_model

NUM_STEPS = 3
START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"


@pytest.fixture(scope="module")
def world():
    return join_world()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("teacher") / "model")


def outcome(world, model_path, *, stage=3, steps=NUM_STEPS, checkpoint=None, **distill):
    config = {"distill": {"measure_every": 0, **distill}, "update": {"zero_stage": stage}}
    return take_steps(Order(model=str(model_path), steps=steps, config=config, checkpoint=checkpoint), world)


def distances(outcome):
    return [metrics["loss/distill"] for metrics in outcome["history"]]


def test_every_teacher_of_the_configuration_exists():
    assert set(get_args(get_type_hints(DistillConfig)["teacher"])) == set(TEACHERS)


@pytest.mark.parametrize("stage", [3, 0])
@pytest.mark.slow
def test_the_limits_of_the_average_are_the_live_and_the_frozen_teacher(world, model_path, stage):
    live, frozen = (outcome(world, model_path, stage=stage, teacher=name) for name in ("live", "frozen"))
    follows, stays = (
        outcome(world, model_path, stage=stage, teacher="ema", ema_decay=decay) for decay in (0.0, 1.0)
    )
    between = outcome(world, model_path, stage=stage, teacher="ema", ema_decay=0.5)
    assert distances(follows) == pytest.approx(distances(live), rel=1e-4)
    assert distances(stays) == distances(frozen)
    assert distances(frozen)[0] == pytest.approx(distances(live)[0], rel=1e-5), (
        "all begin as the start policy"
    )
    assert distances(frozen)[2] != pytest.approx(distances(live)[2], rel=1e-3)
    assert distances(between)[2] != pytest.approx(distances(live)[2], rel=1e-4)
    assert distances(between)[2] != pytest.approx(distances(frozen)[2], rel=1e-4)


def test_stages_agree_and_an_untied_head_is_gathered(world, tmp_path):
    path = write_model(tmp_path / "model", tied=False)
    whole, sharded = (outcome(world, path, stage=stage, teacher="ema", ema_decay=0.5) for stage in (1, 3))
    assert distances(whole) == pytest.approx(distances(sharded), rel=1e-5)


def test_a_frozen_teacher_is_the_start_policy_after_any_number_of_steps(world, model_path):
    """Its hidden states and head are those of the model on disk, while the student has moved."""
    config = make_config(
        model_path, distill={"measure_every": 0, "teacher": "frozen"}, optimizer={"learning_rate": 0.05}
    )
    policy = make_policy(config, world)
    (microbatch,) = batch_of(Order(model="", max_tokens=10_000), world, "token")
    totals = batch_of(Order(model="", max_tokens=10_000), world, "token").totals
    found = []
    rows = policy._teacher.rows

    def noted(on_device):
        context = rows(on_device)
        with context as read:
            found.append((read.hidden.clone(), read.head[0].clone()))
        return rows(on_device)

    policy._teacher.rows = noted
    for _ in range(2):
        policy.accumulate(
            microbatch, totals, TermWeights(policy=1.0, distill_spread=0.5, distill_no_spread=0.5)
        )
        policy.step()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_an_average_is_resumed_where_it_was(world, model_path, tmp_path):
    straight = outcome(world, model_path, steps=4, teacher="ema", ema_decay=0.5)
    outcome(world, model_path, steps=2, teacher="ema", ema_decay=0.5, checkpoint=str(tmp_path))
    resumed = outcome(world, model_path, steps=4, teacher="ema", ema_decay=0.5, checkpoint=str(tmp_path))
    assert distances(resumed) == pytest.approx(distances(straight)[2:], rel=1e-6)
    for name, parameter in straight["parameters"].items():
        torch.testing.assert_close(resumed["parameters"][name], parameter, rtol=0, atol=1e-6)


def test_a_missing_average_is_named(world, model_path, tmp_path):
    policy = make_policy(make_config(model_path, distill={"measure_every": 0, "teacher": "ema"}), world)
    for name, file in policy.files().items():
        write_tensors(tmp_path / name, *file)
    (tmp_path / "teacher_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="teacher_00000.safetensors is missing, expected the average"):
        policy.read_state(tmp_path)


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    """Wider, deeper and of another head than the student."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "tied": False, "seed": 5}
    return write_model(tmp_path_factory.mktemp("other") / "model", **sizes)


def of_another(world, model_path, path, **options):
    return outcome(world, model_path, teacher="other", teacher_path=str(path), **options)


def test_a_teacher_of_another_size_reads_and_stays(world, model_path, other_path):
    """Its distances are those of its own logits, at every stage; they fall as the student follows."""
    sharded = of_another(world, model_path, other_path, steps=6)
    whole = of_another(world, model_path, other_path, steps=6, stage=0)
    assert distances(whole) == pytest.approx(distances(sharded), rel=1e-4)
    assert distances(sharded)[-1] < distances(sharded)[0]
    own, others = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (model_path, other_path)
    )
    total, count = 0.0, 0
    for sample in make_samples(16):
        if not sample.is_distilled:
            continue
        prompt = sample.teacher_prompt_ids
        shift = len(prompt) - sample.prompt_length
        with torch.no_grad():
            student = own(torch.tensor(sample.ids)[None]).logits[0][sample.query_positions - 1]
            read = torch.tensor([*prompt, *sample.ids[sample.prompt_length :]])[None]
            teacher = others(read).logits[0][sample.query_positions + shift - 1]
        total += divergence_rows(student, teacher, JSD).values.mean().item()
        count += 1
    assert distances(sharded)[0] == pytest.approx(total / count, rel=1e-4)


def test_the_start_policy_by_its_path_is_the_frozen_teacher(world, model_path):
    by_path = of_another(world, model_path, model_path)
    assert distances(by_path) == distances(outcome(world, model_path, teacher="frozen"))


def test_a_teacher_of_another_vocabulary_is_refused(world, model_path, tmp_path):
    path = write_model(tmp_path / "model", vocab_size=101)
    words = rf"distill.teacher_path: found a vocabulary of 101 entries in {path} beside 97 in {model_path}"
    with pytest.raises(ConfigError, match=words):
        of_another(world, model_path, path)
    with pytest.raises(DataError, match=r"distill.teacher_path"):
        of_another(world, model_path, tmp_path / "nothing")


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    shutil.copytree(START_POLICY, tmp_path / "same")
    shutil.copytree(START_POLICY, tmp_path / "another")
    spec = json.loads((tmp_path / "another/tokenizer.json").read_text())
    words = spec["model"]["vocab"]
    first, second = list(words)[200:202]
    words[first], words[second] = words[second], words[first]
    (tmp_path / "another/tokenizer.json").write_text(json.dumps(spec))
    codec = load_codec(str(START_POLICY))

    def check(path):
        distill = {"teacher": "other", "teacher_path": str(path)}
        check_same_tokens(make_config(START_POLICY, distill=distill), codec)

    check(tmp_path / "same")
    check_same_tokens(make_config(START_POLICY), codec)
    with pytest.raises(ConfigError, match=r"distill.teacher_path: found another tokenizer in .*another"):
        check(tmp_path / "another")

    plain, critic = make_config(START_POLICY), CriticConfig(path=str(tmp_path / "another"))
    check_same_tokens(dataclasses.replace(plain, critic=critic), codec)  # nobody reads it
    ppo = dataclasses.replace(plain, critic=critic, advantage=AdvantageConfig(estimator="gae"))
    with pytest.raises(ConfigError, match=r"critic.path: found another tokenizer in .*the critic reads"):
        check_same_tokens(ppo, codec)
