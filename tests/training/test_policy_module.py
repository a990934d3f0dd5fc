"""The loss of a microbatch on a real Hugging Face model: what has a gradient, and what has none."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.building.policy import head_options
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.policy_module import (
    PolicyModule,
    TeacherRows,
    hidden_rows,
    student_values,
    teacher_hidden_rows,
)
from megatron_sd.training.start_policy import load_for_training
from megatron_sd.training.update_metrics import SUM_NAMES
from tests.training.fakes import make_config, make_samples, write_model

GRPO = TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
DISTILL = TermWeights(policy=0.0, distill_spread=1.0, distill_no_spread=1.0)
BOTH = TermWeights(policy=1.0, distill_spread=0.3, distill_no_spread=0.3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "qwen2")


def build(model_path, **changes):
    config = make_config(model_path, **changes)
    return PolicyModule(
        load_for_training(config.model), head_options(config), config.policy_loss, config.distill
    )


def run(module, samples, weights, *, chunk_rows=1024, max_tokens=10_000, reference=None):
    """Loss, sums, gradients by name."""
    module.zero_grad()
    head = module.model.get_output_embeddings()
    head.options = dataclasses.replace(head.options, chunk_rows=chunk_rows)
    (batch,) = pack(samples, max_tokens=max_tokens, world_size=1, aggregation="token")
    total, total_sums = 0.0, torch.zeros(len(SUM_NAMES))
    for microbatch in batch:
        loss, sums = module(DeviceMicrobatch.of(microbatch, CPU), batch.totals, weights, reference)
        loss.backward()
        total, total_sums = total + loss.item(), total_sums + sums
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return total, dict(zip(SUM_NAMES, total_sums.tolist())), gradients


def test_loss_equals_the_definition(model_path):
    """Token by token in float64 from the model's own logits, sample by sample without padding."""
    module, samples = build(model_path, kl_weight=0.0), make_samples(12)
    loss, sums, _ = run(module, samples, BOTH)
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval().double()
    policy_terms, distill_terms = [], []
    for s in samples:
        logits = plain(torch.tensor(s.ids)[None]).logits[0]
        log_probs = torch.log_softmax(logits, -1)
        for p in np.flatnonzero(s.loss_mask):
            ratio = torch.exp(log_probs[p - 1, s.ids[p]] - float(s.rollout_logprobs[p]))
            policy_terms.append(-min(ratio * s.advantages[p], ratio.clamp(0.8, 1.2) * s.advantages[p]))
        if s.is_distilled:
            teacher_ids = torch.tensor([*s.teacher_prompt_ids, *s.ids[s.prompt_length :]])
            shift = len(s.teacher_prompt_ids) - s.prompt_length
            teacher = torch.softmax(plain(teacher_ids[None]).logits[0], -1)
            values = []
            for p in s.query_positions:
                target, student = teacher[p + shift - 1], log_probs[p - 1].exp()
                mixture = (target + student) / 2
                values.append(
                    0.5 * (target * (target / mixture).log()).sum()
                    + 0.5 * (student * (student / mixture).log()).sum()
                )
            distill_terms.append(sum(values) / len(values))
    policy_loss = sum(t.item() for t in policy_terms) / len(policy_terms)
    distill_loss = sum(t.item() for t in distill_terms) / len(distill_terms)
    assert sums["policy_loss"] == pytest.approx(policy_loss, rel=1e-5)
    assert sums["jsd_loss"] == pytest.approx(distill_loss, rel=1e-4)
    assert loss == pytest.approx(policy_loss + 0.3 * distill_loss, rel=1e-5)
    assert sums["rows"] == len(policy_terms)
    assert sums["query_rows"] == sum(len(s.query_positions) for s in samples if s.is_distilled)


def test_a_block_for_each_turn_distils_each_part_under_its_own_prompt(model_path):
    """The loss and its gradient are those of the parts, each as a sample of its own, weighed by their query
    tokens."""
    module = build(model_path, kl_weight=0.0)
    sample = next(s for s in make_samples(30) if s.is_distilled and len(s.query_positions) > 3)
    other, share = (90, 91, 92), 2 / len(sample.query_positions)
    first = dataclasses.replace(sample, query_positions=sample.query_positions[:2])
    second = dataclasses.replace(sample, query_positions=sample.query_positions[2:], teacher_prompt_ids=other)
    whole, _, gradients = run(module, [dataclasses.replace(sample, later_prompts=((2, other),))], DISTILL)
    (loss_1, _, early), (loss_2, _, late) = (run(module, [part], DISTILL) for part in (first, second))
    assert (
        whole
        == pytest.approx(share * loss_1 + (1 - share) * loss_2, rel=1e-5)
        != pytest.approx(loss_1, rel=1e-2)
    )
    for name, found in gradients.items():
        torch.testing.assert_close(
            found, share * early[name] + (1 - share) * late[name], rtol=1e-4, atol=1e-7
        )


def test_without_teacher_prompts_the_step_is_grpo_bit_for_bit(model_path):
    module = build(model_path)
    samples = [dataclasses.replace(s, teacher_prompt_ids=None) for s in make_samples(12)]
    loss, sums, gradients = run(module, samples, BOTH)
    grpo_loss, grpo_sums, grpo_gradients = run(module, samples, GRPO)
    assert loss == grpo_loss and sums == grpo_sums and sums["query_rows"] == 0
    assert all(torch.equal(gradients[name], grpo_gradients[name]) for name in gradients)


def test_a_teacher_with_the_students_own_prompt_gives_exactly_zero(model_path):
    """Teacher rows are aligned with student rows: same prompt, same states, L_SD = 0 in value and
    gradient."""
    module = build(model_path)
    longest = max(len(s.ids) for s in make_samples(12))
    samples = []
    for s in make_samples(12):  # one length for all, so that both passes see the same shapes
        pad = longest - len(s.ids)
        samples.append(
            dataclasses.replace(
                s, ids=np.pad(s.ids, (0, pad)), loss_mask=np.pad(s.loss_mask, (0, pad)),
                rollout_logprobs=np.pad(s.rollout_logprobs, (0, pad)),
                turns=np.pad(s.turns, (0, pad)), teacher_prompt_ids=tuple(s.ids[: s.prompt_length]),
            )
        )  # fmt: skip
    for sample in samples:
        if sample.is_distilled:
            loss, sums, gradients = run(module, [sample], DISTILL)
            assert sums["query_rows"] > 0
            assert abs(loss) < 1e-10
            assert max(g.abs().max() for g in gradients.values()) < 1e-6
            assert sums["student_entropy"] == pytest.approx(sums["teacher_entropy"], rel=1e-5)


def test_same_ids_same_shape_give_equal_rows(model_path):
    """Student and teacher through the same backbone: bit for bit the same hidden states."""
    module = build(model_path)
    ids = torch.randint(0, 97, (3, 9))
    rows = torch.tensor([2, 10, 25])
    assert torch.equal(hidden_rows(module.model, ids, rows), hidden_rows(module.model, ids, rows))
    one, two = (
        hidden_rows(module.model, ids[:, :5], torch.tensor([1])),
        hidden_rows(module.model, ids, torch.tensor([1])),
    )
    # what follows, padding included, changes nothing
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_the_teacher_has_no_gradient(model_path):
    """The gradient equals that of the same divergence with the teacher's states written down as constants."""
    module, samples = build(model_path), make_samples(12)
    _, _, gradients = run(module, samples, DISTILL)
    module.zero_grad()
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    microbatch = DeviceMicrobatch.of(batch.microbatches[0], CPU)
    frozen = build(model_path)
    constants = teacher_hidden_rows(frozen.model, microbatch)
    assert not constants.requires_grad
    head = module.model.get_output_embeddings()

    def row_loss(values, rows, queries):
        return (
            microbatch.query_weights[queries] * values.divergences
        ).sum() / batch.totals.distilled_rollouts

    hidden = hidden_rows(module.model, microbatch.input_ids, microbatch.row_index)
    head(hidden, TeacherRows(constants), microbatch.head_rows, row_loss).loss.backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_only_query_rows_carry_the_distillation_gradient(model_path):
    """At the head's input: L_SD has a gradient at query rows alone, exactly zero elsewhere."""
    module, samples = build(model_path), make_samples(12)
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    microbatch = DeviceMicrobatch.of(batch.microbatches[0], CPU)
    caught = []
    head = module.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: args[0].retain_grad() or caught.append(args[0]))
    loss, _ = module(microbatch, batch.totals, DISTILL, None)
    loss.backward()
    moved = caught[0].grad.abs().sum(-1) > 0
    expected = torch.zeros(len(microbatch.row_index), dtype=torch.bool)
    expected[microbatch.query_rows] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("weights", [GRPO, DISTILL])
def test_observations_are_context_and_never_trained_on(model_path, weights):
    """The last hidden state has a gradient exactly at positions that predict a sampled token."""
    module, samples = build(model_path), make_samples(12)
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    plain = batch.microbatches[0]
    states = []

    def keep_student(_module, _args, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            states.append(output.last_hidden_state)

    module.model.base_model.register_forward_hook(keep_student)
    loss, _ = module(DeviceMicrobatch.of(plain, CPU), batch.totals, weights, None)
    loss.backward()
    (student,) = states
    moved = set(torch.nonzero(student.grad.flatten(0, 1).abs().sum(-1)).flatten().tolist())
    allowed = (
        set(plain.row_index.tolist()) if weights is GRPO else set(plain.row_index[plain.query_rows].tolist())
    )
    assert moved and moved <= allowed
    if weights is DISTILL:
        assert moved == allowed


def test_the_students_bits_do_not_depend_on_the_teacher(model_path):
    module, samples = build(model_path, update={"head_chunk_rows": 4}), make_samples(12)
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    microbatch = DeviceMicrobatch.of(batch.microbatches[0], CPU)
    seen = []
    module.model.get_output_embeddings().register_forward_hook(
        lambda _, __, out: seen.append(out.logprobs.detach().clone())
    )
    for weights in (GRPO, BOTH):
        module(microbatch, batch.totals, weights, None)
    assert torch.equal(*seen)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_packing_and_chunking_change_nothing(tmp_path, tied, family):
    module, samples = build(write_model(tmp_path / "model", tied=tied, family=family)), make_samples(14)
    loss, sums, gradients = run(module, samples, BOTH)
    for order, max_tokens, chunk_rows in (
        (samples, 40, 1024),
        (samples[::-1], 120, 7),
        (samples[5:] + samples[:5], 1, 2),
    ):
        found, found_sums, found_gradients = run(
            module, order, BOTH, max_tokens=max_tokens, chunk_rows=chunk_rows
        )
        assert found == pytest.approx(loss, rel=2e-6)
        assert list(found_sums.values()) == pytest.approx(list(sums.values()), rel=1e-4, abs=1e-6)
        for name in gradients:
            torch.testing.assert_close(found_gradients[name], gradients[name], rtol=1e-4, atol=2e-6)
    assert sum("lm_head" in name for name, _ in module.named_parameters()) == (0 if tied else 1)


def test_terms_add_up(model_path):
    """GRPO + L_SD of groups with spread + L_SD of groups without = everything at once."""
    module, samples = build(model_path), make_samples(12)
    passes = (
        GRPO,
        TermWeights(policy=0.0, distill_spread=0.3, distill_no_spread=0.0),
        TermWeights(policy=0.0, distill_spread=0.0, distill_no_spread=0.3),
    )
    results = [run(module, samples, weights) for weights in passes]
    loss, sums, gradients = run(module, samples, BOTH)
    assert sum(r[0] for r in results) == pytest.approx(loss, rel=1e-6)
    for name in SUM_NAMES:
        assert sum(r[1][name] for r in results) == pytest.approx(sums[name], rel=1e-5, abs=1e-7)
    for name in gradients:
        torch.testing.assert_close(sum(r[2][name] for r in results), gradients[name], rtol=1e-4, atol=1e-7)
    assert results[2][0] > 0  # groups without spread do distil


def test_kl_to_a_reference(model_path):
    """At the reference itself the KL and its gradient vanish; away from it the loss grows by kl_weight
    times the k3 mean."""
    module, samples = build(model_path, kl_weight=0.5), make_samples(10)
    (batch,) = pack(samples, max_tokens=10_000, world_size=1, aggregation="token")
    microbatch = DeviceMicrobatch.of(batch.microbatches[0], CPU)
    own = student_values(module.model, microbatch, None, None).logprobs.detach()
    loss, sums, gradients = run(module, samples, GRPO)
    same_loss, same_sums, same_gradients = run(module, samples, GRPO, reference=own)
    assert same_loss == loss and same_sums["kl_loss"] == 0
    for name in gradients:
        torch.testing.assert_close(same_gradients[name], gradients[name], rtol=1e-5, atol=1e-8)
    moved_loss, moved_sums, _ = run(module, samples, GRPO, reference=own + 0.1)
    k3 = np.exp(0.1) - 0.1 - 1
    assert moved_sums["kl_loss"] == pytest.approx(k3, rel=1e-4)
    assert moved_loss == pytest.approx(loss + 0.5 * k3, rel=1e-5)


def test_dropout_is_off_and_the_output_does_not_vary(model_path):
    module = build(model_path)
    assert module.model.config.attention_dropout == 0.0
    ids, rows = torch.randint(0, 97, (2, 8)), torch.arange(16)
    assert module.training
    assert torch.equal(hidden_rows(module.model, ids, rows), hidden_rows(module.model, ids, rows))


def test_gradient_checkpointing_changes_nothing(model_path):
    config = make_config(model_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=True))
    module = PolicyModule(
        load_for_training(config.model), head_options(config), config.policy_loss, config.distill
    )
    samples = make_samples(8)
    loss, _, gradients = run(module, samples, BOTH)
    expected, _, expected_gradients = run(build(model_path), samples, BOTH)
    assert loss == expected
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-6, atol=1e-8)


def test_models_that_cannot_be_used(tmp_path, model_path):
    with pytest.raises(DataError, match="holds no config.json"):
        load_for_training(make_config(tmp_path).model)
    for path in model_path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"final_logit_softcapping": 30.0}))
    with pytest.raises(DataError, match="final_logit_softcapping=30.0"):
        load_for_training(make_config(tmp_path).model)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed here")
def test_an_attention_that_is_not_installed_is_named(model_path):
    with pytest.raises(
        ConfigError, match="model.attention: found 'flash_attention_2', which this machine lacks"
    ):
        load_for_training(make_config(model_path, model={"attention": "flash_attention_2"}).model)
