"""The product of few rows with a large weight matrix on CPUs, which is what every decoding step of a
language model consists of.

The native product (kernels/csrc/linear_cpu.cpp) sums every element in one order, so a row's result does not
depend on how many others there are. Elsewhere, and where it gains nothing, this is torch's own product.
"""

from __future__ import annotations

import ctypes
from types import MethodType

import torch
from torch import Tensor
from torch.nn import functional

from megatron_sd.ops.native import cpu_library

MAX_ROWS = 48  # at 64 the layers of a 0.5B model gain nothing any more
MIN_WEIGHTS = (
    1 << 19
)  # smaller models keep torch's numbers to the bit; about the size from which there is a gain


class LinearTask(ctypes.Structure):
    """kernels/csrc/linear_task.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: [..., depth] and [columns, depth] give [..., columns]. Natively computed
    where no gradient is wanted, for float32 on CPUs, at most MAX_ROWS rows and at least MIN_WEIGHTS
    weights."""
    if not _gains(rows, weight):
        # Of rows in strides (the last tokens of prompts) torch makes a product each, with a copy of the weights.
        return functional.linear(rows.contiguous(), weight, bias)
    out = native_linear(rows.reshape(-1, weight.shape[1]), weight).view(*rows.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


def native_linear(rows: Tensor, weight: Tensor, *, instruction_set: str | None = None) -> Tensor:
    """[n, depth] and [columns, depth], float32 on the CPU, give [n, columns]. The library must be there
    (native/cpu_library.LIBRARY)."""
    rows, weight = rows.contiguous(), weight.contiguous()
    out = torch.empty(len(rows), len(weight), dtype=torch.float32)
    task = LinearTask(
        rows=rows.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        num_rows=len(rows),
        num_columns=len(weight),
        depth=weight.shape[1],
    )
    cpu_library.run("linear", task, device=rows.device, instruction_set=instruction_set)
    return out


def speed_up(model: torch.nn.Module) -> None:
    """Let the model's linear layers compute few rows by `linear`. Its weights may be replaced afterwards."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            # An attribute of the object, which torch calls in place of the class's method.
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(module: torch.nn.Linear, rows: Tensor) -> Tensor:
    return linear(rows, module.weight, module.bias)


def _gains(rows: Tensor, weight: Tensor) -> bool:
    return (
        cpu_library.LIBRARY is not None
        and not torch.is_grad_enabled()
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.shape[-1] == weight.shape[1]
        and 0 < rows.numel() <= MAX_ROWS * rows.shape[-1]
        and weight.numel() >= MIN_WEIGHTS
    )
