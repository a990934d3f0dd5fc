import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sd.ops import few_rows
from megatron_sd.ops.few_rows import MAX_ROWS, MIN_WEIGHTS, linear, native_linear, speed_up
from megatron_sd.ops.native import cpu_library

NEWEST = cpu_library.INSTRUCTION_SETS.index(cpu_library.INSTRUCTION_SET)
needs_library = pytest.mark.skipif(cpu_library.LIBRARY is None, reason=cpu_library.MISSING)


def matrices(num_rows: int, num_columns: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(num_rows + depth)
    return torch.randn(num_rows, depth, generator=random), torch.randn(num_columns, depth, generator=random)


def exact(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (rows.double() @ weight.double().T).float()


@needs_library
@pytest.mark.parametrize("instruction_set", cpu_library.INSTRUCTION_SETS[: NEWEST + 1])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 20])
@pytest.mark.parametrize(("num_columns", "depth"), [(1, 1), (4, 32), (7, 31), (9, 65), (130, 257)])
def test_equals_the_exact_product(num_rows, num_columns, depth, instruction_set):
    rows, weight = matrices(num_rows, num_columns, depth)
    out = native_linear(rows, weight, instruction_set=instruction_set)
    torch.testing.assert_close(out, exact(rows, weight), rtol=1e-5, atol=1e-5 * depth**0.5)


@needs_library
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads():
    rows, weight = matrices(MAX_ROWS, 203, 897)
    together = native_linear(rows, weight)
    for start, stop in ((0, 1), (3, 5), (10, 41), (47, 48)):
        assert torch.equal(native_linear(rows[start:stop], weight), together[start:stop])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(native_linear(rows, weight), together)
    torch.set_num_threads(threads)


@needs_library
def test_nothing_is_read_beside_the_operands():
    """Infinities around the operands, in memory, stay out of the sums."""
    rows, weight = matrices(5, 11, 37)
    around = torch.full((3, 11, 37), torch.inf)
    around[1] = weight
    assert torch.equal(native_linear(rows, around[1]), native_linear(rows, weight))


@torch.no_grad()
def test_as_torch_with_leading_dimensions_bias_and_strides():
    rows, weight = matrices(12, 1024, 512)
    assert weight.numel() >= MIN_WEIGHTS
    bias = torch.arange(1024.0)
    for given in (rows.view(3, 4, 512), torch.cat([rows, rows], dim=1)[:, :512]):
        expected = torch.nn.functional.linear(given, weight, bias)
        torch.testing.assert_close(linear(given, weight, bias), expected, rtol=1e-5, atol=1e-3)
    assert linear(rows[:0], weight).shape == (0, 1024)


def test_gradients_many_rows_and_small_matrices_are_torchs(monkeypatch):
    monkeypatch.setattr(few_rows, "native_linear", lambda *_: pytest.fail("the native product was called"))
    rows, weight = matrices(4, 1024, 512)
    linear(rows, weight.requires_grad_()).sum().backward()
    assert torch.equal(weight.grad[0], rows.sum(0))
    with torch.no_grad():
        for own_rows, own_weight in (
            matrices(MAX_ROWS + 1, 1024, 512),
            matrices(4, 100, 512),
            [m.bfloat16() for m in matrices(4, 1024, 512)],
        ):
            assert torch.equal(linear(own_rows, own_weight), torch.nn.functional.linear(own_rows, own_weight))


@needs_library
@torch.inference_mode()
def test_a_model_that_was_sped_up_follows_its_weights():
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 8))
    speed_up(model)
    rows, weight = matrices(2, 1024, 512)
    model[0].weight.data = weight
    assert torch.equal(model[0](rows), native_linear(rows, weight) + model[0].bias)
    assert torch.equal(
        model(rows), torch.nn.functional.linear(model[0](rows), model[1].weight, model[1].bias)
    )


@torch.no_grad()
def test_another_depth_is_torchs_error_though_the_sizes_divide():
    rows, _ = matrices(4, 1, 1024)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(rows, torch.ones(1024, 512))


@needs_library
@torch.no_grad()
def test_the_product_is_float32_whatever_torchs_default():
    rows, weight = matrices(3, 1024, 512)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(linear(rows, weight), native_linear(rows, weight))
        assert linear(rows, weight).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


class Operators(TorchDispatchMode):
    """What torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_tokens_of_many_prompts_make_one_product(dtype):
    """[m, 1, depth] in strides: torch alone copies the weights m times, which took a real model's head 12 s."""
    hidden, weight = torch.randn(MAX_ROWS + 1, 3, 64, dtype=dtype), torch.randn(96, 64, dtype=dtype)
    with Operators() as seen:
        out = linear(hidden[:, -1:], weight)
    assert "bmm" not in seen.names and seen.names.count("mm") == 1
    torch.testing.assert_close(out[:, 0], hidden[:, -1].clone() @ weight.T)
