"""The product of few rows with a large matrix: ours against torch's linear and against oneDNN's, float32 on
the CPU.

    python -m benchmarks.kernels.few_rows [--threads N] [--json FILE]

Shapes are the language model head, the widening and the narrowing layer of Qwen2.5-0.5B. All three run in
turn; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.baseline import Comparison, report
from megatron_sd.ops.few_rows import native_linear

SHAPES = {"head": (151936, 896), "up": (4864, 896), "down": (896, 4864)}  # [columns, depth]
ROWS = (1, 8, 20, 40)
ROUNDS = 7


def medians(sides: Sequence[Callable[[], torch.Tensor]]) -> list[float]:
    """Milliseconds of each side, run in turn after one warm-up."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(1 + ROUNDS):
        for own, side in zip(times, sides):
            start = time.perf_counter()
            side()
            own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own[1:]) for own in times]


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    comparisons = []
    for name, (columns, depth) in SHAPES.items():
        weight = torch.randn(columns, depth)
        for num_rows in ROWS:
            rows = torch.randn(num_rows, depth)
            ours, linear, onednn = medians(
                [
                    lambda: native_linear(rows, weight),  # noqa: B023 (called at once)
                    lambda: torch.nn.functional.linear(rows, weight),  # noqa: B023
                    lambda: torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""),  # noqa: B023
                ]
            )
            comparisons += [
                Comparison(
                    name=f"{name}, {num_rows} rows", ours=ours, theirs=theirs, unit="ms", against=against
                )
                for against, theirs in (("torch", linear), ("oneDNN", onednn))
            ]
    report(f"few_rows, {arguments.threads} threads", comparisons, arguments.json)


if __name__ == "__main__":
    main()
