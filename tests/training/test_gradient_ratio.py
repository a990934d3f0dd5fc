import dataclasses

import pytest
import torch

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.building.policy import head_options
from megatron_sd.config import AlphaConfig, DistillConfig
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.policy_module import PolicyModule
from megatron_sd.training.start_policy import load_for_training
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController, AlphaSchedule, GradientRatio
from tests.launched import assert_same_figures
from tests.rank_programs.update_steps import Order, batch_of, take_steps
from tests.training.fakes import make_config, make_policy, write_model
from tests.training.same_steps import assert_same_steps


def ratio(overall, alpha=1.0):
    return GradientRatio(alpha=alpha, overall=overall, no_spread=0.0, cosine=0.0)


def schedule(measure_every=10, **fields):
    return AlphaSchedule(
        config=AlphaConfig(**({"value": 0.5, "warmup_steps": 3} | fields)), measure_every=measure_every
    )


def test_fixed_alpha_warms_up_and_ignores_measurements():
    fixed = schedule()
    assert [fixed.alpha(step) for step in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert fixed.after(ratio(7.0)).alpha(9) == 0.5
    assert [step for step in range(30) if fixed.measures(step)] == [3, 13, 23]
    assert not any(schedule(measure_every=0).measures(step) for step in range(30))
    assert not any(schedule(value=0.0).measures(step) for step in range(30))


def test_alpha_by_ratio_probes_then_hits_the_target_then_follows_slowly():
    probe = schedule(mode="grad_ratio", target_ratio=0.2)
    assert [probe.alpha(step) for step in (2, 3)] == [0.0, 0.5]
    hit = probe.after(ratio(0.05, alpha=0.5))  # |g_SD| / |g_GRPO| = 0.1 at alpha 1
    assert hit.alpha(4) == pytest.approx(2.0)
    followed = hit.after(ratio(0.6, alpha=2.0))  # 0.3 now; the running value is 0.2
    assert followed.alpha(5) == pytest.approx(1.0)
    assert hit.after(ratio(2e-9, alpha=2.0)).after(ratio(2e-9, alpha=2.0)).alpha(5) == 3.0  # max_value


def test_alpha_by_ratio_measures_until_a_measurement_succeeds():
    waiting = schedule(mode="grad_ratio")
    assert [step for step in range(8) if waiting.measures(step)] == [3, 4, 5, 6, 7]
    nothing = GradientRatio(alpha=0.5, overall=None, no_spread=None, cosine=None)
    assert waiting.after(nothing) == waiting
    assert [step for step in range(30) if waiting.after(ratio(1.0)).measures(step)] == [3, 13, 23]


def test_a_ratio_of_nothing_is_no_ratio():
    assert GradientRatio.of(0.1, [0.0, 1.0, 1.0, 0.0]).metrics == {}
    assert GradientRatio.of(0.1, [4.0, 1.0, 0.25, -1.0]).metrics == {
        "distill/grad_ratio": 0.5, "distill/grad_ratio_no_spread": 0.25, "distill/grad_cosine": -0.5,
    }  # fmt: skip


def test_no_distillation_makes_one_plain_pass_and_no_metrics():
    controller = AlphaController(
        DistillConfig(block="none", measure_every=1, alpha=AlphaConfig(warmup_steps=0)), policy_weight=0.5
    )
    assert list(controller.passes(0)) == [TermWeights(policy=0.5, distill_spread=0.0, distill_no_spread=0.0)]
    assert controller.metrics() == {}


def test_grad_ratio_needs_measurements():
    with pytest.raises(ConfigError, match="distill.measure_every is 0"):
        AlphaController(
            DistillConfig(measure_every=0, alpha=AlphaConfig(mode="grad_ratio")), policy_weight=1.0
        )


@pytest.mark.slow
def test_measurement_is_exact_and_costs_no_correctness(tmp_path):
    """The figures equal those of gradients taken apart by plain torch; the step equals an unmeasured one."""
    world = join_world()
    config = make_config(write_model(tmp_path / "model"), distill={"measure_every": 1})
    module = PolicyModule(
        load_for_training(config.model), head_options(config), config.policy_loss, config.distill
    )
    batch = batch_of(Order(model="", max_tokens=90), world, "token")

    def gradient(**weights):
        module.zero_grad()
        for microbatch in batch:
            weights_ = TermWeights(
                **({"policy": 0.0, "distill_spread": 0.0, "distill_no_spread": 0.0} | weights)
            )
            module(DeviceMicrobatch.of(microbatch, world.device), batch.totals, weights_, None)[0].backward()
        return torch.cat([p.grad.flatten().double() for p in module.parameters()])

    policy, no_spread = gradient(policy=1.0), gradient(distill_no_spread=0.5)
    distill = no_spread + gradient(distill_spread=0.5)
    order = Order(model=config.model.path, max_tokens=90, config={"distill": {"measure_every": 1}})
    measured = take_steps(order, world)
    found = measured["history"][0]
    assert found["distill/grad_ratio"] == pytest.approx((distill.norm() / policy.norm()).item(), rel=1e-5)
    assert found["distill/grad_ratio_no_spread"] == pytest.approx(
        (no_spread.norm() / policy.norm()).item(), rel=1e-5
    )
    cosine = torch.nn.functional.cosine_similarity(distill, policy, dim=0).item()
    assert found["distill/grad_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert 0 < found["distill/grad_ratio_no_spread"] < found["distill/grad_ratio"]

    plain = take_steps(dataclasses.replace(order, config={"distill": {"measure_every": 0}}), world)
    common = [
        {name: one[name] for name in other}
        for one, other in zip(measured["history"], plain["history"], strict=True)
    ]
    assert_same_figures({"history": common}, plain)
    assert_same_steps([measured], [plain])


def test_adaptive_alpha_reaches_its_target(tmp_path):
    world = join_world()
    alpha = AlphaConfig(mode="grad_ratio", target_ratio=0.2, warmup_steps=1)
    distill = {"measure_every": 1, "alpha": alpha}
    order = Order(
        model=str(write_model(tmp_path / "model")),
        steps=4,
        config={"distill": distill, "optimizer": {"learning_rate": 1e-6}},
    )
    history = take_steps(order, world)["history"]
    assert history[0]["distill/alpha"] == 0.0 and history[1]["distill/alpha"] == 1e-3
    assert [metrics["distill/grad_ratio"] for metrics in history[2:]] == pytest.approx([0.2, 0.2], rel=0.01)


def test_state_travels(tmp_path):
    controller = AlphaController(DistillConfig(alpha=AlphaConfig(mode="grad_ratio")), policy_weight=1.0)
    controller.schedule = controller.schedule.after(ratio(0.4))
    other = AlphaController(DistillConfig(alpha=AlphaConfig(mode="grad_ratio")), policy_weight=1.0)
    other.load_state(controller.state())
    assert other.schedule == controller.schedule


def test_policy_without_stage_3_cannot_measure(tmp_path):
    policy = make_policy(make_config(write_model(tmp_path / "model"), update={"zero_stage": 2}), join_world())
    controller = AlphaController(
        DistillConfig(measure_every=1, alpha=AlphaConfig(warmup_steps=0)), policy_weight=1.0
    )
    with pytest.raises(ConfigError, match="at stage 3 only"):
        for _ in controller.passes(0):
            controller.observe(policy)
