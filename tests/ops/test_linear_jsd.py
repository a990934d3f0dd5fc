"""The fused head: the same values and gradients as whole logits, whatever the chunk size, and nothing kept
of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from megatron_sd.ops.head import one_pass as module
from megatron_sd.ops.head.one_pass import linear_jsd
from megatron_sd.ops.head.types import TEACHER_LOGITS, HeadOptions, HeadRows
from megatron_sd.ops.jsd_reference import divergence_rows
from tests.ops.divergences import JSD

NUM_ROWS, NUM_QUERIES, WIDTH, VOCABULARY = 11, 5, 16, 53
QUERY_ROWS = np.array([1, 2, 6, 7, 10])
ADVANTAGES, ALPHA = torch.linspace(-1, 1, NUM_ROWS), 3 * torch.arange(1.0, 6.0)
WARM = replace(JSD, temperature=1.5)


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """Who visits the rows: native code, where there is any, or torch."""
    if request.param == "torch":
        monkeypatch.setattr(module, "native_obstacle", lambda *_, **__: "asked for by a test")


either_way = pytest.mark.usefixtures("way")


def options(**changes):
    fields = {
        "sampling_temperature": 0.8,
        "divergence": WARM,
        "teacher_logits": "delta",
        "chunk_rows": 4,
        "target": "teacher",
    }
    return HeadOptions(**(fields | changes))


def inputs(bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = draw(NUM_ROWS, WIDTH).to(dtype).requires_grad_()
    weight = draw(VOCABULARY, WIDTH).mul(0.3).to(dtype).requires_grad_()
    bias = draw(VOCABULARY).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, VOCABULARY, (NUM_ROWS,), generator=generator)
    teacher = draw(NUM_QUERIES, WIDTH).to(dtype)
    return hidden, teacher, weight, bias, HeadRows(targets, torch.from_numpy(QUERY_ROWS), QUERY_ROWS)


def curved_loss(values, rows, queries):
    """Not linear in the log-probabilities, as a clipped ratio is not."""
    policy = (ADVANTAGES[rows] * (values.logprobs + 1.5).exp().clamp(max=0.3)).sum()
    return policy + (ALPHA[queries] * values.divergences).sum()


def with_entropies(values, rows, queries):
    """And a bonus for some rows' entropies, a penalty for others'."""
    return curved_loss(values, rows, queries) - (ADVANTAGES[rows] * values.entropies).sum()


def run(chunk_rows, bias=True, dtype=torch.float32, row_loss=curved_loss, **changes):
    hidden, teacher, weight, bias, rows = inputs(bias, dtype)
    changed = options(chunk_rows=chunk_rows, **changes)
    values = linear_jsd(hidden, teacher, (weight, bias), rows, row_loss=row_loss, options=changed)
    (2 * values.loss).backward()
    return values, [leaf.grad for leaf in (hidden, weight, bias) if leaf is not None]


def definition(bias=True, dtype=torch.float32, row_loss=curved_loss, **changes):
    """Values and gradients from whole logits in float64, by autograd."""
    o = options(**changes)
    hidden, teacher, weight, bias, rows = inputs(bias, dtype)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    logits, teacher_logits = (
        F.linear(*leaves),
        F.linear(teacher.double(), *(leaf.detach() for leaf in leaves[1:])),
    )
    log_probs, teacher_log_probs = (
        torch.log_softmax(z / o.sampling_temperature, -1) for z in (logits, teacher_logits)
    )
    result = divergence_rows(logits[rows.query_rows], teacher_logits, o.divergence)
    logprobs = log_probs.gather(-1, rows.targets[:, None])[:, 0]
    values = module.RowValues(
        torch.zeros(()),
        logprobs,
        -(log_probs.exp() * log_probs).sum(-1),
        result.values,
        -(teacher_log_probs.exp() * teacher_log_probs).sum(-1),
        teacher_log_probs.gather(-1, rows.targets[rows.query_rows][:, None])[:, 0],
        result.truncated_mass,
    )
    values = values._replace(loss=row_loss(values, slice(None), slice(None)))
    (2 * values.loss).backward()
    return values, [leaf.grad for leaf in leaves]


@either_way
@pytest.mark.parametrize("teacher_logits", TEACHER_LOGITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("changes", [{}, {"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"top_k": 7},
                                     {"top_k": 7, "tail_bucket": True}])  # fmt: skip
def test_equals_whole_logits_in_float64(changes, bias, teacher_logits):
    divergence = replace(WARM, **changes)
    values, gradients = run(4, bias=bias, teacher_logits=teacher_logits, divergence=divergence)
    expected, expected_gradients = definition(bias=bias, divergence=divergence)
    for found, exact in zip(values, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact.detach().double(), rtol=2e-5, atol=2e-6)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    assert (
        (values.truncated_masses > 0).all()
        if "top_k" in changes
        else torch.count_nonzero(values.truncated_masses) == 0
    )


@either_way
def test_entropies_have_the_gradient_of_autograd():
    values, gradients = run(4, row_loss=with_entropies)
    expected, expected_gradients = definition(row_loss=with_entropies)
    torch.testing.assert_close(values.loss.double(), expected.loss.detach(), rtol=2e-5, atol=2e-6)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@either_way
@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 10])
@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_chunks_and_blocks_change_nothing(chunk_rows, block_rows, monkeypatch):
    whole, whole_gradients = run(NUM_ROWS)
    monkeypatch.setitem(module.BLOCK_ELEMENTS, "cpu", block_rows * VOCABULARY)
    values, gradients = run(chunk_rows)
    for found, expected in zip(values, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for found, expected in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@either_way
@pytest.mark.parametrize("chunk_rows", [3, NUM_ROWS])
@pytest.mark.parametrize("teacher_logits", TEACHER_LOGITS)
def test_bfloat16_is_within_its_rounding_of_float64(teacher_logits, chunk_rows):
    """And the head's gradient is summed over chunks in float32: no worse than in one chunk."""
    _, gradients = run(chunk_rows, dtype=torch.bfloat16, teacher_logits=teacher_logits)
    _, expected = definition(dtype=torch.bfloat16)
    for found, exact in zip(gradients, expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).norm() / exact.norm()).item() < 0.02


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest number of rows of any [rows, vocabulary] matrix that an operation gives, and the
    products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if (
                torch.is_tensor(tensor)
                and tensor.ndim == 2
                and tensor.shape[1] == VOCABULARY
                and len(tensor) != WIDTH
            ):
                self.largest = max(self.largest, len(tensor))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.products.append(tuple(args[-1].shape))
        return out


def test_logits_of_more_rows_than_a_chunk_never_exist():
    with Watch() as watch:
        run(3)
    assert watch.largest == 3


def test_every_product_is_made_once():
    """4 chunks with query rows: logits, teacher's difference, hidden gradient, weight gradient. The
    backward has none."""
    hidden, teacher, weight, _, rows = inputs(bias=False)
    with Watch() as watch:
        values = linear_jsd(
            hidden, teacher, (weight, None), rows, row_loss=curved_loss, options=options(chunk_rows=3)
        )
        assert len(watch.products) == 4 * 4
        values.loss.backward()
        assert len(watch.products) == 4 * 4


def test_what_needs_no_gradient_gets_none():
    hidden, teacher, weight, bias, rows = inputs()
    call = {"row_loss": curved_loss, "options": options()}
    expected, _ = run(4)
    with torch.no_grad():
        values = linear_jsd(hidden, teacher, (weight, bias), rows, **call)
    assert not values.loss.requires_grad and torch.equal(values.logprobs, expected.logprobs)
    with Watch() as watch:
        linear_jsd(hidden, teacher, (weight.detach(), None), rows, **call).loss.backward()
    assert len(watch.products) == 3 * 3  # a frozen head: no product for its gradient
    values = linear_jsd(hidden, teacher, (weight, bias), rows, row_loss=None, options=options())
    assert (
        not values.loss.requires_grad
        and values.loss == 0
        and torch.equal(values.entropies, expected.entropies)
    )


def test_a_head_with_lora_is_its_merged_weight():
    hidden, teacher, weight, bias, rows = inputs()
    up, down = (
        torch.randn(VOCABULARY, 2).mul(0.1).requires_grad_(),
        torch.randn(2, WIDTH).mul(0.1).requires_grad_(),
    )
    frozen = weight.detach()
    merged = linear_jsd(
        hidden, teacher, (frozen + up @ down, None), rows, row_loss=curved_loss, options=options()
    )
    merged.loss.backward()
    dense = (frozen + up @ down).detach().requires_grad_()
    linear_jsd(hidden, teacher, (dense, None), rows, row_loss=curved_loss, options=options()).loss.backward()
    torch.testing.assert_close(up.grad, dense.grad @ down.detach().t(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(down.grad, up.detach().t() @ dense.grad, rtol=1e-5, atol=1e-6)


def test_the_weight_may_be_gone_before_the_backward():
    """As under ZeRO-3, which takes a gathered weight apart after the forward."""
    _, expected = run(4)
    hidden, teacher, weight, bias, rows = inputs()
    values = linear_jsd(hidden, teacher, (weight * 1.0, bias), rows, row_loss=curved_loss, options=options())
    with torch.no_grad():
        weight.fill_(torch.nan)
    (2 * values.loss).backward()
    for leaf, gradient in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_a_second_backward_is_refused():
    hidden, teacher, weight, bias, rows = inputs()
    loss = linear_jsd(hidden, teacher, (weight, bias), rows, row_loss=curved_loss, options=options()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward"):
        loss.backward()


@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_logits", ["delta", "float32_delta"])
def test_equal_hidden_states_give_exactly_zero(dtype, teacher_logits):
    hidden, _, weight, bias, rows = inputs(dtype=dtype)
    values = linear_jsd(
        hidden, hidden[rows.query_rows].detach(), (weight, bias), rows,
        row_loss=lambda values, *_: values.divergences.sum(), options=options(teacher_logits=teacher_logits),
    )  # fmt: skip
    values.loss.backward()
    assert torch.count_nonzero(values.divergences) == 0
    assert torch.count_nonzero(hidden.grad) == 0 and torch.count_nonzero(weight.grad) == 0


@either_way
def test_the_policys_bits_do_not_depend_on_the_teacher():
    """Log-probabilities and, where the divergence counts nothing, every gradient."""

    def gradients(rows, teacher):
        hidden, _, weight, bias, _ = inputs()
        values = linear_jsd(
            hidden, teacher, (weight, bias), rows,
            row_loss=lambda v, at, _: (ADVANTAGES[at] * v.logprobs).sum() + 0 * v.divergences.sum(), options=options(),
        )  # fmt: skip
        values.loss.backward()
        return [values.logprobs, values.entropies, hidden.grad, weight.grad, bias.grad]

    _, teacher, _, _, rows = inputs()
    for found, expected in zip(
        gradients(rows, teacher), gradients(rows.without_teacher(), teacher[:0]), strict=True
    ):
        assert torch.equal(found, expected)


def gradient_error(teacher_logits, distance):
    """Of the hidden states' gradient in bfloat16, against float64 from the same hidden states."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(48, 96, generator=generator).bfloat16()
    teacher = (hidden.float() * (1 + distance * torch.randn(48, 96, generator=generator))).bfloat16()
    weight = torch.randn(701, 96, generator=generator).mul(0.35).bfloat16()
    every = np.arange(48)
    rows = HeadRows(torch.zeros(48, dtype=torch.long), torch.from_numpy(every), every)
    found = []
    for dtype, chosen in ((torch.bfloat16, teacher_logits), (torch.float64, "same_dtype")):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        values = linear_jsd(
            leaf, teacher.to(dtype), (weight.to(dtype), None), rows,
            row_loss=lambda v, *_: v.divergences.sum(),
            options=options(teacher_logits=chosen, divergence=JSD),
        )  # fmt: skip
        values.loss.backward()
        found.append(leaf.grad.double())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def test_near_the_teacher_only_rounded_logits_lose_the_gradient():
    """Logits 0.03 apart: two rounded products are wrong by half or more; the difference of hidden states
    keeps 2 %."""
    assert gradient_error("same_dtype", 0.01) > 0.5
    for choice in ("delta", "float32_delta", "float32"):
        assert gradient_error(choice, 0.01) < 0.03
    assert gradient_error("same_dtype", 1.0) < 0.05  # far apart it does no harm


@either_way
def test_no_rows_stay_connected():
    hidden, teacher, weight, bias, _ = inputs()
    nothing = HeadRows(
        torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), np.zeros(0, np.int64)
    )
    values = linear_jsd(
        hidden[:0],
        teacher[:0],
        (weight, bias),
        nothing,
        row_loss=lambda v, *_: v.logprobs.sum(),
        options=options(),
    )
    assert values.loss == 0 and values.logprobs.shape == (0,)
    values.loss.backward()
    assert torch.count_nonzero(weight.grad) == 0 and torch.count_nonzero(hidden.grad) == 0


@either_way
def test_masked_vocabulary_entries_and_nan():
    """A bias of -inf is a smaller vocabulary; NaN stays in its row's values."""
    hidden, teacher, weight, _, rows = inputs()
    rows = rows._replace(targets=rows.targets.clamp(max=VOCABULARY - 10))
    bias = torch.zeros(VOCABULARY)
    bias[-9:] = -torch.inf
    call = {"row_loss": curved_loss, "options": options()}
    masked = linear_jsd(hidden, teacher, (weight, bias), rows, **call)
    cut = linear_jsd(hidden, teacher, (weight[:-9], None), rows, **call)
    for found, expected in zip(masked, cut, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    masked.loss.backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    broken = hidden.detach().clone()
    broken[3, 0] = torch.nan
    values = linear_jsd(broken, teacher, (weight, None), rows, row_loss=None, options=options())
    assert values.logprobs.isnan().tolist() == [row == 3 for row in range(NUM_ROWS)]


def test_shapes_that_do_not_fit_are_named():
    hidden, teacher, weight, bias, rows = inputs()
    with pytest.raises(ValueError, match=r"hidden is \(10, 16\) for 11 targets"):
        linear_jsd(hidden[:10], teacher, (weight, bias), rows, row_loss=None, options=options())
    with pytest.raises(ValueError, match=r"teacher_hidden \(4, 16\) for 5 query rows"):
        linear_jsd(hidden, teacher[:4], (weight, bias), rows, row_loss=None, options=options())
    with pytest.raises(ValueError, match=r"weight \(53, 15\)"):
        linear_jsd(hidden, teacher, (weight[:, :15], bias), rows, row_loss=None, options=options())
