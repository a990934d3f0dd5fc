"""From hidden states to the gradients of GRPO and L_SD: the fused head against whole logits, and against
recomputed chunks.

    python -m benchmarks.kernels.linear_jsd [--json FILE] [--rounds 3] [--dtype float32|bfloat16]

Two shapes: a vocabulary of 151,936 in four chunks, and the demo's (623 entries, one chunk); 5 % and 12 %
query rows. Times are process CPU time of forward and backward, medians over rounds in which every variant
runs once. "values, then gradients" is what a design costs whose backward recomputes the logits. "extra" is
the peak of resident memory over what was there before; the gradients of hidden rows and weight are in it.
Gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline import Comparison, report
from benchmarks.kernels.head_peers import checkpointed, whole_logits
from benchmarks.resident import extra_mib
from megatron_sd.algorithm.policy_loss import KnownRows, policy_rows
from megatron_sd.config import PolicyLossConfig
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.one_pass import linear_jsd
from megatron_sd.ops.head.types import HeadOptions, HeadRows, RowValues


class Shape(NamedTuple):
    """Rows R, query rows Q, vocabulary V, width H, rows a chunk."""

    name: str
    rows: int
    queries: int
    vocabulary: int
    width: int
    chunk_rows: int
    repeats: int


JSD = Divergence(kind="jsd", beta=0.5, temperature=1.0)
SHAPES = (Shape("V=151,936", 256, 13, 151_936, 896, 64, 1), Shape("demo", 1024, 128, 623, 128, 1024, 20))


class Inputs(NamedTuple):
    """Tensors of one shape; the first and third get gradients."""

    hidden: Tensor
    teacher: Tensor
    weight: Tensor
    rows: HeadRows
    rollout_logprobs: Tensor
    advantages: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Random, the teacher's states near the student's."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden = draw(shape.rows, shape.width)
    queries = np.sort(np.random.default_rng(0).choice(shape.rows, shape.queries, replace=False))
    teacher = hidden[queries] + 0.1 * draw(shape.queries, shape.width)
    weight = draw(shape.vocabulary, shape.width).mul_(3 / shape.width**0.5)
    rows = HeadRows(
        torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator),
        torch.from_numpy(queries),
        queries,
    )
    with torch.no_grad():
        logprobs, _ = checkpointed(hidden, teacher, weight, rows.targets, rows.query_rows, shape.chunk_rows)
    noise, advantages = 0.1 * draw(shape.rows), draw(shape.rows)
    leaves = hidden.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype).requires_grad_()
    return Inputs(*leaves, rows, logprobs + noise, advantages)


def loss_of(inputs: Inputs, logprobs: Tensor, divergences: Tensor, rows: slice = slice(None)) -> Tensor:
    """Clipped policy gradient of all rows and divergence of the query rows."""
    policy = policy_rows(
        logprobs,
        KnownRows(inputs.rollout_logprobs[rows], inputs.rollout_logprobs[rows], inputs.advantages[rows]),
        config=PolicyLossConfig(),
    )
    return policy.losses.sum() / len(inputs.hidden) + 0.1 * divergences.sum() / len(inputs.teacher)


def fused(inputs: Inputs, shape: Shape, divergence: Divergence = JSD) -> Tensor:
    """ops/head/one_pass.py."""
    options = HeadOptions(
        sampling_temperature=1.0, divergence=divergence,
        teacher_logits="delta", chunk_rows=shape.chunk_rows, target="teacher",
    )  # fmt: skip

    def row_loss(values: RowValues, rows: slice, _: slice) -> Tensor:
        return loss_of(inputs, values.logprobs, values.divergences, rows)

    head = inputs.weight, None
    return linear_jsd(
        inputs.hidden, inputs.teacher, head, inputs.rows, row_loss=row_loss, options=options
    ).loss


def values_then_gradients(inputs: Inputs, shape: Shape) -> Tensor:
    """A pass for the values before the pass with gradients."""
    with torch.no_grad():
        fused(inputs, shape)
    return fused(inputs, shape)


def recomputing(inputs: Inputs, shape: Shape) -> Tensor:
    """Chunks under torch's checkpoint."""
    rows = inputs.rows
    values = checkpointed(
        inputs.hidden, inputs.teacher, inputs.weight, rows.targets, rows.query_rows, shape.chunk_rows
    )
    return loss_of(inputs, *values)


def whole(inputs: Inputs, _: Shape) -> Tensor:
    """All logits at once."""
    rows = inputs.rows
    return loss_of(
        inputs, *whole_logits(inputs.hidden, inputs.teacher, inputs.weight, rows.targets, rows.query_rows)
    )


VARIANTS = {
    "fused": fused,
    "values, then gradients": values_then_gradients,
    "recomputing": recomputing,
    "whole logits": whole,
}


def run(loss: Callable, inputs: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    """One forward and backward: the two gradients, taken from their leaves."""
    loss(inputs, shape).backward()
    gradients = inputs.hidden.grad, inputs.weight.grad
    inputs.hidden.grad = inputs.weight.grad = None
    return gradients


def compare(shape: Shape, dtype: torch.dtype, num_rounds: int) -> list[Comparison]:
    """Check, measure, print."""
    inputs = make_inputs(shape, dtype)
    expected = run(whole, inputs, shape)
    for name, loss in VARIANTS.items():
        errors = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(run(loss, inputs, shape), expected, strict=True)
        ]
        print(
            f"{shape.name}, {name:<23} gradients off whole logits' by {errors[0]:.1e} (hidden),"
            f" {errors[1]:.1e} (weight)"
        )
    del expected
    memory = {name: extra_mib(lambda loss=loss: run(loss, inputs, shape)) for name, loss in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(num_rounds):
        for name, loss in VARIANTS.items():
            started = time.process_time()
            for _ in range(shape.repeats):
                run(loss, inputs, shape)
            seconds[name].append((time.process_time() - started) / shape.repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in VARIANTS:
        least = min(seconds[name]) * 1e3
        print(
            f"{shape.name}, {name:<23} {median[name] * 1e3:9.1f} ms CPU (least {least:.1f})  extra"
            f" {memory[name]:7.0f} MiB"
        )
    figures = (("head", median, "s CPU"), ("head's memory", memory, "MiB"))
    return [
        Comparison(
            name=f"{what}, {shape.name}", ours=figure["fused"], theirs=figure[peer], unit=unit, against=peer
        )
        for what, figure, unit in figures
        for peer in VARIANTS
        if peer != "fused" and figure["fused"] > 0
    ]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    comparisons = [
        c for shape in SHAPES for c in compare(shape, getattr(torch, arguments.dtype), arguments.rounds)
    ]
    report("linear_jsd", comparisons, arguments.json)


if __name__ == "__main__":
    main()
