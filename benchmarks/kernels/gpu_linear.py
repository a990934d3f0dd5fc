"""The head and the divergence together on a GPU: linear_jsd against TRL's formula on whole logits, and
Liger-Kernel's.

The floor is that of four products (student's logits, teacher's, the rows' gradient, the head's): 8 N H V
operations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.gpu_rows import BETA, VOCABULARY, trl_formula, upcast_formula
from benchmarks.kernels.gpu_timing import median_ms, peak_mib

WIDTHS = (2048, 3584, 5120)
NUM_ROWS = (1024, 4096)


def fused(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], object]:
    """linear_jsd with every row a query row. Raises ImportError where this version has none."""
    from megatron_sd.ops.divergence import Divergence
    from megatron_sd.ops.head.one_pass import HeadOptions, HeadRows, linear_jsd

    options = HeadOptions(
        sampling_temperature=1.0, divergence=Divergence(kind="jsd", beta=BETA, temperature=1.0),
        teacher_logits="delta", chunk_rows=2048, target="teacher",
    )  # fmt: skip
    num_rows = len(hidden)
    every = torch.arange(num_rows, device="cuda")
    rows = HeadRows(torch.zeros_like(every), every, np.arange(num_rows))

    def run() -> object:
        values = linear_jsd(
            hidden,
            teacher,
            (weight, None),
            rows,
            row_loss=lambda found, *_: found.divergences.sum(),
            options=options,
        )
        return torch.autograd.grad(values.loss, (hidden, weight))

    return run


def unfused(formula: Callable, hidden: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], object]:
    """A formula on the whole logits of both sides."""

    def run() -> object:
        with torch.no_grad():
            teacher_logits = teacher @ weight.t()
        return torch.autograd.grad(formula(hidden @ weight.t(), teacher_logits, "jsd"), (hidden, weight))

    return run


def liger(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """Liger-Kernel's fused linear JSD, None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    loss = LigerFusedLinearJSD(jsd_beta=BETA)
    return lambda: torch.autograd.grad(loss(hidden, weight, teacher, weight.detach()), (hidden, weight))


def measure(matmul_flops_a_ms: float, *, rounds: int) -> list[dict]:
    """Print a line a variant; return the figures."""
    figures = []
    for width in WIDTHS:
        for num_rows in NUM_ROWS:
            hidden, teacher = (
                torch.randn(num_rows, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)
            )
            hidden, teacher = hidden.requires_grad_(), hidden.detach() + 0.05 * teacher
            weight = (
                torch.randn(VOCABULARY, width, dtype=torch.bfloat16, device="cuda") / width**0.5
            ).requires_grad_()
            variants = {"eager": unfused(trl_formula, hidden, teacher, weight)}
            variants["eager, upcast"] = unfused(upcast_formula, hidden, teacher, weight)
            try:
                variants = {"fused": fused(hidden, teacher, weight)} | variants
            except ImportError as error:
                print(f"  the fused head is not measured: {error}")
            if peer := liger(hidden, teacher, weight):
                variants["liger"] = peer
            floor_ms = 8 * num_rows * width * VOCABULARY / matmul_flops_a_ms
            for variant, ms in median_ms(variants, rounds=rounds).items():
                peak = peak_mib(variants[variant])
                print(
                    f"  H={width} N={num_rows:<5} {variant:<17} {ms:8.2f} ms  {floor_ms / ms:5.1%} of the"
                    f" floor  extra {peak:7.0f} MiB",
                    flush=True,
                )
                figures.append({
                    "width": width, "num_rows": num_rows, "variant": variant, "ms": ms, "share_of_floor": floor_ms / ms,
                    "extra_mib": peak,
                })  # fmt: skip
            del hidden, teacher, weight, variants
            torch.cuda.empty_cache()
    return figures
