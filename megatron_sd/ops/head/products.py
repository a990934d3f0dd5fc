"""The head's matrix products, where wanted with float32 results from inputs of half that width.

On a GPU that is one product whose float32 sums are stored unrounded. A CPU has no such product: its inputs
are copied to float32, a part of the vocabulary at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

PART = 1 << 15  # vocabulary entries that are copied to float32, or multiplied, at one time


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, unrounded: bool) -> Tensor:
    """hidden [N, H] @ weight [V, H].T + bias [V], in their dtype, or unrounded in float32."""
    if not unrounded or weight.dtype.itemsize >= torch.float32.itemsize:
        return F.linear(hidden, weight, bias)
    if hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(weight), PART):
            logits[:, start : start + PART] = hidden.float() @ weight[start : start + PART].float().t()
    return logits if bias is None else logits.add_(bias)


def add_outer_product(total: Tensor, gradient: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """total [V, H] += gradient [N, V].T @ hidden [N, H]; summed in total's dtype, which may be float32 with
    half-width inputs. is_first: whatever stands in total is written over."""
    kept = 0 if is_first else 1
    for start in range(0, len(total), PART):
        part, columns = total[start : start + PART], gradient[:, start : start + PART].t()
        if total.dtype == hidden.dtype:
            part.addmm_(columns, hidden, beta=kept)
        elif not hidden.is_cuda:
            part.addmm_(columns.to(total.dtype), hidden.to(total.dtype), beta=kept)
        elif is_first:
            part.copy_(torch.mm(columns, hidden, out_dtype=total.dtype))
        else:
            part.add_(torch.mm(columns, hidden, out_dtype=total.dtype))
