"""The weight of a token's divergence off policy, and of the policy loss beside it."""

import dataclasses
import math

import pytest
import torch

from megatron_sd.algorithm.distill_loss import TermWeights, importance_weights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.algorithm.packing.microbatches import distilled_part
from megatron_sd.config import AlphaConfig, DistillConfig
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.teacher_side.gradient_ratio import AlphaController
from megatron_sd.training.update_metrics import SUM_NAMES, to_metrics
from tests.training.fakes import make_samples, write_model
from tests.training.test_policy_module import BOTH, CPU, DISTILL, build, run


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "qwen2")


def test_the_weight_is_the_ratio_cut_at_the_cap():
    """e^.9 = 2.4596 is cut to 2; e^-.5 = .6065; beyond +-20 the log-ratio is held."""
    log_ratios = torch.tensor([0.9, -0.5, 0.0, -30.0, 30.0], dtype=torch.float64)
    logprobs = (log_ratios - 3.0).requires_grad_()
    found = importance_weights(logprobs, torch.full_like(log_ratios, -3.0), 2.0)
    assert found.tolist() == pytest.approx([2.0, 0.6065, 1.0, 2.0612e-9, 2.0], abs=1e-4)
    assert found[3].item() == pytest.approx(math.exp(-20.0), rel=1e-9)
    assert not found.requires_grad
    uncut = importance_weights(logprobs, torch.full_like(log_ratios, -3.0), math.inf)
    assert uncut[4].item() == pytest.approx(math.exp(20.0))


def test_a_capped_loss_is_that_of_weights_multiplied_beforehand(model_path):
    """Loss, figures and gradient, in one chunk of rows or in many."""
    samples, (plain, capped) = (
        make_samples(12),
        (build(model_path), build(model_path, distill={"importance_cap": 0.7})),
    )
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    (microbatch,) = batch.microbatches
    own = DeviceMicrobatch.of(distilled_part(microbatch, DISTILL), CPU)
    states = plain.model.base_model(input_ids=own.input_ids, use_cache=False).last_hidden_state
    logits = states.flatten(0, 1)[own.row_index] @ plain.model.get_output_embeddings().weight.T
    logprobs = torch.log_softmax(logits, -1).gather(-1, own.head_rows.targets[:, None]).squeeze(-1)
    weights = importance_weights(logprobs, own.rollout_logprobs, 0.7)
    assert (weights == 0.7).any() and (weights < 0.7).any()

    weighted = dataclasses.replace(microbatch, query_weights=microbatch.query_weights * weights.numpy())
    loss, sums = plain(DeviceMicrobatch.of(weighted, CPU), batch.totals, BOTH, None)
    loss.backward()
    wanted = dict(zip(SUM_NAMES, sums.tolist(), strict=True))
    for chunk_rows in (1024, 3):
        found, figures, gradients = run(capped, samples, BOTH, chunk_rows=chunk_rows)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        assert figures["jsd_loss"] == pytest.approx(wanted["jsd_loss"], rel=1e-5)
        assert figures["jsd"] == pytest.approx(wanted["jsd"], rel=1e-5)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_pass_without_the_policys_term_is_the_distillation_alone(model_path):
    """policy_loss.weight 0: the loss has no policy term, and the metrics none that were not measured."""
    alpha = AlphaConfig(value=0.5, warmup_steps=0)
    own = DistillConfig(measure_every=0, alpha=alpha)
    (weights,) = AlphaController(own, policy_weight=0.0).passes(0)
    assert weights == TermWeights(policy=0.0, distill_spread=0.5, distill_no_spread=0.5)
    (halved,) = AlphaController(own, policy_weight=0.5).passes(0)
    assert halved == TermWeights(policy=0.5, distill_spread=0.5, distill_no_spread=0.5)
    module, samples = build(model_path), make_samples(12)
    alone, sums, _ = run(module, samples, weights)
    assert alone == pytest.approx(0.5 * sums["jsd_loss"], rel=1e-6)
    both, both_sums, _ = run(module, samples, halved)
    assert both == pytest.approx(0.5 * both_sums["policy_loss"] + alone, rel=1e-5)
    metrics = to_metrics([sums[name] for name in SUM_NAMES])
    assert metrics["loss/distill"] == pytest.approx(sums["jsd_loss"])
    assert not {"loss/policy", "rollout/entropy_nats"} & set(metrics)


def test_rows_below_zero_are_counted(model_path):
    """A forward KL whose large summands are cut is negative where only they were positive."""
    module = build(model_path, distill={"divergence": "forward_kl", "entry_clip": 1e-4})
    _, sums, _ = run(module, make_samples(12), BOTH)
    metrics = to_metrics([sums[name] for name in SUM_NAMES])
    assert 0.5 < metrics["distill/below_zero_share"] <= 1.0
    whole = build(model_path, distill={"divergence": "forward_kl"})
    _, sums, _ = run(whole, make_samples(12), BOTH)
    assert to_metrics([sums[name] for name in SUM_NAMES])["distill/below_zero_share"] == 0.0
