"""The divergence of the sampled token alone, by hand and in the head's one pass."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from megatron_sd.errors import ConfigError
from megatron_sd.ops.head.sampled import sampled_divergence
from megatron_sd.ops.head.vocab_parallel import VocabShard
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import divergence_rows
from tests.ops.divergences import JSD
from tests.ops.test_jsd import value_and_gradient
from tests.ops.test_linear_jsd import VOCABULARY, curved_loss, inputs, options, run
from tests.ops.test_relatives import STUDENT, TEACHER

SAMPLED = replace(JSD, kind="sampled")


def test_its_mean_over_samples_is_the_reverse_kl_and_so_is_its_gradients():
    """T = (.7, .2, .1), S = (.5, .3, .2): log S - log T = (-.3365, .4055, .6931), whose mean under S is .09203."""
    probabilities = STUDENT[0].exp()

    def mean(logits):
        log_q = torch.log_softmax(logits, -1)[0]
        return (probabilities * sampled_divergence(log_q, TEACHER[0])).sum()[None]

    values = sampled_divergence(STUDENT[0], TEACHER[0])
    assert values.tolist() == pytest.approx([-0.3365, 0.4055, 0.6931], abs=1e-4)
    found, gradient = value_and_gradient(mean, STUDENT)
    reverse = replace(JSD, kind="reverse_kl")
    expected, expected_gradient = value_and_gradient(lambda s: divergence_rows(s, TEACHER, reverse), STUDENT)
    assert found.item() == pytest.approx(0.09203, abs=1e-4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_equal_models_give_exactly_zero():
    logprobs = STUDENT[0].clone().requires_grad_()
    values = sampled_divergence(logprobs, STUDENT[0].clone())
    values.sum().backward()
    assert torch.count_nonzero(values) == 0 and torch.count_nonzero(logprobs.grad) == 0


def definition():
    """Values and gradients from whole logits in float64."""
    hidden, teacher, weight, bias, rows = inputs()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    temperature = options().sampling_temperature
    log_q = torch.log_softmax(F.linear(*leaves) / temperature, -1).gather(-1, rows.targets[:, None])[:, 0]
    read = F.linear(teacher.double(), *(leaf.detach() for leaf in leaves[1:]))
    log_p = torch.log_softmax(read / temperature, -1).gather(-1, rows.targets[rows.query_rows][:, None])[:, 0]
    own = log_q[rows.query_rows]
    # its gradient is (log Q - log P) grad log Q; the value beside it has none
    divergences = (own - log_p).detach() * (1 + own - own.detach())
    values = run(4, divergence=SAMPLED)[0]._replace(logprobs=log_q, divergences=divergences)
    loss = curved_loss(values, slice(None), slice(None))
    (2 * loss).backward()
    return loss, divergences, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("teacher_logits", ["delta", "float32"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_in_one_pass_it_is_that_of_whole_logits(teacher_logits, is_sharded):
    """In chunks, and where the vocabulary is in shards (here one)."""
    shard = VocabShard(start=0, num_real=VOCABULARY, gather=lambda own: own[None]) if is_sharded else None
    values, gradients = run(4, divergence=SAMPLED, teacher_logits=teacher_logits, shard=shard)
    loss, divergences, expected = definition()
    assert values.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(values.divergences.double(), divergences.detach(), rtol=1e-5, atol=1e-6)
    for found, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(values.truncated_masses) == 0


def test_it_has_no_rows_of_its_own():
    rows = torch.arange(1)
    with pytest.raises(ConfigError, match="distill.divergence is 'sampled', expected one of"):
        jsd_rows(STUDENT, TEACHER, rows, rows, torch.ones(1), divergence=SAMPLED)
    for changes in ({"top_k": 2}, {"entry_clip": 0.1}, {"temperature": 1.1}):
        with pytest.raises(ConfigError, match="distill.divergence is 'sampled' with distill.top_k"):
            replace(SAMPLED, **changes)
