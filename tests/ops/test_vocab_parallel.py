"""A sharded vocabulary against a whole one: values and gradients, on two to four real ranks and on one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from megatron_sd.errors import ConfigError
from megatron_sd.ops.head.vocab_parallel import VocabShard, vocab_parallel_divergence, vocab_parallel_logprobs
from megatron_sd.ops.jsd_reference import divergence_rows
from tests.nursery import run_ranks
from tests.ops.divergences import JSD, each_divergence, each_of
from tests.ops.test_jsd import logits, textbook, value_and_gradient
from tests.rank_programs.vocab_parallel import (
    KINDS,
    LAYOUTS,
    NUM_RANKS,
    PADDING,
    SKEWED,
    TEMPERATURE,
    inputs,
    one_rank,
)

ALONE = VocabShard(start=0, num_real=83, gather=lambda value: value[None])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Files of the four ranks."""
    directory = tmp_path_factory.mktemp("vocab_parallel")
    run_ranks("tests.rank_programs.vocab_parallel:run", str(directory), ranks=NUM_RANKS, limit_s=300)
    return directory


def whole_vocabulary(divergence, dtype):
    """What one rank with all columns gets, by autograd through the reference."""
    hidden, teacher, weight, targets, divergence_slopes, logprob_slopes = inputs()
    leaf, own = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    student = F.linear(leaf, own)
    values = divergence_rows(student, F.linear(teacher.to(dtype), own), divergence).values
    log_probs = torch.log_softmax(student / TEMPERATURE, -1)
    logprobs = log_probs.gather(-1, targets[:, None])[:, 0]
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    terms = (values * divergence_slopes, logprobs * logprob_slopes, entropies * divergence_slopes)
    sum(term.sum() for term in terms).backward()
    return values, logprobs, entropies, leaf.grad, own.grad


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
@each_of(KINDS, like=SKEWED)
def test_ranks_together_equal_one(directory, layout, divergence):
    sizes = LAYOUTS[layout]
    found = [torch.load(directory / f"{layout}_{rank}.pt")[divergence.kind] for rank in range(len(sizes))]
    expected = whole_vocabulary(divergence, torch.float64)
    for own in found:  # values and the hidden rows' gradient: the same bits everywhere
        for number in range(4):
            assert torch.equal(own[number], found[0][number])
            torch.testing.assert_close(own[number].double(), expected[number], rtol=1e-6, atol=1e-6)
        assert torch.count_nonzero(own[4][-PADDING:]) == 0
    weight_gradient = torch.cat([own[4][:-PADDING] for own in found])
    torch.testing.assert_close(weight_gradient.double(), expected[4], rtol=1e-6, atol=1e-6)
    alone = one_rank(0, (sum(sizes),), lambda value: value[None])[divergence.kind]
    for mine, single in zip(found[0][:4], alone[:4], strict=True):
        torch.testing.assert_close(mine, single, rtol=1e-6, atol=1e-6)


@each_divergence
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 0.7)])
def test_formulas_in_float64(divergence, beta, temperature):
    student, teacher = logits(7, 83, seed=1), logits(7, 83, seed=2)
    divergence = replace(divergence, beta=beta, temperature=temperature)
    expected = value_and_gradient(lambda s: textbook(s, teacher, divergence), student)
    found = value_and_gradient(lambda s: vocab_parallel_divergence(s, teacher, ALONE, divergence), student)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-13)


@each_divergence
def test_equal_rows_small_distances_and_masks(divergence):
    student = logits(5, 83, scale=8.0, dtype=torch.float32)
    divergence = replace(divergence, beta=0.3)

    def through(teacher, own=student):
        return value_and_gradient(lambda s: vocab_parallel_divergence(s, teacher, ALONE, divergence), own)

    values, gradient = through(student.clone())
    assert torch.count_nonzero(values) == 0 and torch.count_nonzero(gradient) == 0
    teacher = student + 0.01 * logits(5, 83, scale=1.0, seed=1, dtype=torch.float32)
    exact = textbook(student.double(), teacher.double(), divergence)
    assert ((through(teacher)[0].double() - exact).norm() / exact.norm()).item() < 2e-3
    masked, other = student.clone(), teacher.clone()
    masked[:, 70:], other[:, 70:] = -torch.inf, -torch.inf
    values, gradient = through(other, masked)
    smaller = textbook(masked[:, :70].double(), other[:, :70].double(), divergence)
    torch.testing.assert_close(values.double(), smaller, rtol=5e-3, atol=0)
    assert torch.count_nonzero(gradient[:, 70:]) == 0
    masked[2] = -torch.inf
    assert through(other, masked)[0].isnan().tolist() == [row == 2 for row in range(5)]


def test_logprobs_of_masked_columns_and_no_rows():
    student, targets = logits(4, 83, dtype=torch.float32), torch.tensor([0, 5, 69, 30])
    student[:, 70:] = -torch.inf
    logprobs, entropies = vocab_parallel_logprobs(student, targets, ALONE, temperature=1.0)
    expected = torch.log_softmax(student[:, :70], -1)
    torch.testing.assert_close(logprobs, expected.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    nothing = student[:0].requires_grad_()
    values = vocab_parallel_divergence(nothing, nothing, ALONE, JSD)
    (values.sum() + vocab_parallel_logprobs(nothing, targets[:0], ALONE, temperature=1.0)[0].sum()).backward()
    assert nothing.grad.shape == (0, 83)


def test_what_needs_the_whole_vocabulary_is_refused():
    student = logits(2, 83)
    with pytest.raises(ConfigError, match="distill.divergence is 'mse', expected jsd, forward_kl or"):
        vocab_parallel_divergence(student, student, ALONE, replace(JSD, kind="mse"))
    with pytest.raises(
        ConfigError, match="distill.top_k is 4, expected null where the vocabulary is sharded"
    ):
        vocab_parallel_divergence(student, student, ALONE, replace(JSD, top_k=4))
