"""The chunked head: the same values and gradients as whole logits, whatever the chunk size."""

import numpy as np
import pytest
import torch

from megatron_sd.algorithm.logprobs import Chunk, HeadOptions, HeadRows, plan_chunks, row_values, shifted_logits
from megatron_sd.ops.jsd_reference import divergence_rows

NUM_ROWS, NUM_QUERIES, WIDTH, VOCABULARY = 11, 5, 16, 53


def options(**changes):
    fields = {"sampling_temperature": 0.8, "divergence": "jsd", "beta": 0.5, "temperature": 1.5, "top_k": None, "chunk_rows": 4}
    return HeadOptions(**(fields | changes))


def inputs(bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = draw(NUM_ROWS, WIDTH).requires_grad_()
    weight = draw(VOCABULARY, WIDTH).mul(0.3).requires_grad_()
    bias = draw(VOCABULARY).requires_grad_() if bias else None
    targets = torch.randint(0, VOCABULARY, (NUM_ROWS,), generator=generator)
    query_rows = torch.tensor([1, 2, 6, 7, 10])
    return hidden, draw(NUM_QUERIES, WIDTH), weight, bias, targets, query_rows


def run(chunk_rows, bias=True, **changes):
    hidden, teacher, weight, bias, targets, query_rows = inputs(bias)
    chunks = plan_chunks(NUM_ROWS, query_rows.numpy(), chunk_rows)
    values = row_values(hidden, teacher, (weight, bias), HeadRows(targets, query_rows, chunks), options=options(**changes))
    loss = (values.logprobs * torch.linspace(-1, 1, NUM_ROWS)).sum() + 3 * (values.divergences * torch.arange(1.0, 6.0)).sum()
    loss.backward()
    return values, [hidden.grad, weight.grad] + ([bias.grad] if bias is not None else [])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("divergence", ["jsd", "forward_kl", "reverse_kl"])
def test_equals_whole_logits_in_float64(divergence, bias):
    values, gradients = run(4, bias=bias, divergence=divergence)
    hidden, teacher, weight, bias_, targets, query_rows = (t if t is None else t.detach() for t in inputs(bias))
    leaves = [t.double().requires_grad_() for t in (hidden, weight, *(() if bias_ is None else (bias_,)))]
    logits = torch.nn.functional.linear(*leaves)
    teacher_logits = torch.nn.functional.linear(teacher.double(), *(leaf.detach() for leaf in leaves[1:]))
    log_probs = torch.log_softmax(logits / 0.8, -1)
    expected = log_probs.gather(-1, targets[:, None])[:, 0]
    divergences = divergence_rows(
        logits[query_rows], teacher_logits, divergence=divergence, beta=0.5, temperature=1.5, top_k=None
    ).values
    torch.testing.assert_close(values.logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.entropies.double(), -(log_probs.exp() * log_probs).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.divergences.double(), divergences, rtol=1e-4, atol=1e-6)
    teacher_log_probs = torch.log_softmax(teacher_logits / 0.8, -1)
    entropies = -(teacher_log_probs.exp() * teacher_log_probs).sum(-1)
    torch.testing.assert_close(values.teacher_entropies.double(), entropies, rtol=1e-5, atol=1e-5)
    loss = (expected * torch.linspace(-1, 1, NUM_ROWS)).sum() + 3 * (divergences * torch.arange(1.0, 6.0)).sum()
    loss.backward()
    for found, leaf in zip(gradients, leaves):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 10])
@pytest.mark.parametrize("top_k", [None, 7])
def test_chunked_equals_unchunked(chunk_rows, top_k):
    whole, whole_gradients = run(NUM_ROWS, top_k=top_k)
    values, gradients = run(chunk_rows, top_k=top_k)
    for found, expected in zip(values, whole):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for found, expected in zip(gradients, whole_gradients):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if top_k is None:
        assert torch.count_nonzero(values.truncated_masses) == 0
    else:
        assert ((values.truncated_masses > 0) & (values.truncated_masses < 1)).all()


def test_logits_of_more_rows_than_a_chunk_never_exist():
    """Peak number of [rows, vocabulary] elements seen by any single operation of forward and backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if torch.is_tensor(tensor) and tensor.ndim == 2 and tensor.shape[1] == VOCABULARY and len(tensor) != WIDTH:
                    largest = max(largest, len(tensor))
            return out

    with Watch():
        run(3)
    assert largest == 3


def test_equal_hidden_states_give_exactly_zero():
    hidden, _, weight, bias, targets, query_rows = inputs()
    rows = HeadRows(targets, query_rows, plan_chunks(NUM_ROWS, query_rows.numpy(), 4))
    for dtype in (torch.float32, torch.bfloat16):
        states = hidden.detach().to(dtype).requires_grad_()
        values = row_values(states, states[query_rows].detach(), (weight.to(dtype), bias.to(dtype)), rows, options=options())
        values.divergences.sum().backward()
        assert torch.count_nonzero(values.divergences) == 0
        assert torch.count_nonzero(states.grad) == 0


def test_near_the_teacher_bfloat16_keeps_the_divergence():
    """The teacher's logits come from the difference of hidden states: far better than from two rounded products."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 128, generator=generator).bfloat16()
    teacher = (hidden.float() * (1 + 0.01 * torch.randn(64, 128, generator=generator))).bfloat16()
    weight = torch.randn(512, 128, generator=generator).mul(0.3).bfloat16()

    def divergence(student, other):
        return divergence_rows(student, other, divergence="jsd", beta=0.5, temperature=1.0, top_k=None).values

    exact = divergence(hidden.double() @ weight.double().T, teacher.double() @ weight.double().T)
    logits = torch.nn.functional.linear(hidden, weight).float()
    ours = divergence(logits, shifted_logits(logits, teacher - hidden, weight)).double()
    rounded = divergence(logits, torch.nn.functional.linear(teacher, weight).float()).double()
    error, rounded_error = ((v - exact).abs().mean() / exact.mean() for v in (ours, rounded))
    assert error < 0.03 < rounded_error


def test_no_rows_stay_connected():
    hidden, _, weight, bias, targets, query_rows = inputs()
    rows = HeadRows(targets[:0], query_rows[:0], plan_chunks(0, np.zeros(0), 4))
    values = row_values(hidden[:0], hidden[:0], (weight, bias), rows, options=options())
    values.logprobs.sum().backward()
    assert torch.count_nonzero(weight.grad) == 0 and torch.count_nonzero(hidden.grad) == 0


def test_chunks_cover_rows_and_query_rows():
    chunks = plan_chunks(10, np.array([0, 3, 4, 9]), 4)
    assert chunks == [Chunk(0, 4, 0, 2), Chunk(4, 8, 2, 3), Chunk(8, 10, 3, 4)]
    assert plan_chunks(0, np.zeros(0), 4) == [Chunk(0, 0, 0, 0)]
