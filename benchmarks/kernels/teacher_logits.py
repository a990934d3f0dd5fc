"""How wrong the divergence and its gradient become in bfloat16 when teacher and student are close, by
`distill.teacher_logits`.

    python -m benchmarks.kernels.teacher_logits [--json FILE]

Hidden states and head in bfloat16, V = 151,936, H = 256, logits of standard deviation 3.5; exact means
float64 from the same states. The table is Markdown: ratio of the summed divergence to the exact one, and
the error of its gradient with respect to the student's hidden states, by the standard deviation of the
logits' difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline import Comparison, report
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.one_pass import linear_jsd
from megatron_sd.ops.head.types import TEACHER_LOGITS, HeadOptions, HeadRows

NUM_ROWS, VOCABULARY, WIDTH, LOGIT_DEVIATION = 8, 151_936, 256, 3.5
DISTANCES = (0.001, 0.008, 0.03, 0.1, 0.3)  # of the hidden states, relative


def value_and_gradient(hidden: Tensor, teacher: Tensor, weight: Tensor, choice: str) -> tuple[float, Tensor]:
    """Sum of divergences (beta 0.5), and its gradient with respect to `hidden`, in float64."""
    every = np.arange(NUM_ROWS)
    rows = HeadRows(torch.zeros(NUM_ROWS, dtype=torch.long), torch.from_numpy(every), every)
    options = HeadOptions(
        sampling_temperature=1.0, divergence=Divergence(kind="jsd", beta=0.5, temperature=1.0),
        teacher_logits=choice, chunk_rows=NUM_ROWS, target="teacher",
    )  # fmt: skip
    leaf = hidden.clone().requires_grad_()
    head = weight, None
    loss = linear_jsd(
        leaf, teacher, head, rows, row_loss=lambda v, *_: v.divergences.sum(), options=options
    ).loss
    loss.backward()
    return loss.item(), leaf.grad.double()


def main() -> None:
    """Print the table and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, WIDTH, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * LOGIT_DEVIATION / WIDTH**0.5).bfloat16()
    noise = torch.randn(NUM_ROWS, WIDTH, generator=generator)
    print(
        "| logits apart by | "
        + " | ".join(f"{choice}: value, gradient off by" for choice in TEACHER_LOGITS)
        + " |"
    )
    print("|---|" + "---|" * len(TEACHER_LOGITS))
    comparisons = []
    for distance in DISTANCES:
        teacher = (hidden.float() + distance * noise).bfloat16()
        exact, exact_gradient = value_and_gradient(
            hidden.double(), teacher.double(), weight.double(), "same_dtype"
        )
        errors, cells = {}, []
        for choice in TEACHER_LOGITS:
            value, gradient = value_and_gradient(hidden, teacher, weight, choice)
            errors[choice] = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
            cells.append(f"{value / exact:.2f}x, {errors[choice]:.1%}")
        apart = ((teacher.double() - hidden.double()) @ weight.double().t()).std().item()
        print(f"| {apart:.3f} | " + " | ".join(cells) + " |", flush=True)
        name = f"gradient error, logits {apart:.3f} apart"
        figures = {"ours": 100 * errors["delta"], "theirs": 100 * errors["same_dtype"]}
        comparisons.append(Comparison(name=name, unit="%", against="same_dtype", **figures))
    report("teacher_logits", comparisons, arguments.json)


if __name__ == "__main__":
    main()
