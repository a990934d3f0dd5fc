"""The passes around the head's products: two native visits to the logits against torch's blocks, in turn.

    python -m benchmarks.kernels.head_visits [--json FILE] [--rounds 3] [--dtype float32|bfloat16] [--top-k K]
        [--threads N]

512 rows, 64 of them query rows, V = 151,936, H = 896, one chunk, forward and backward. Times are process
CPU time and wall time, medians over rounds in which either runs once. "visits" is all that lies between the
products for the logits and those for the gradients, the caller's loss included; "products" the four
products; the rest is allocation and the gradient's last factor. Gradients are compared before anything is
timed. On a machine that other work keeps busy, take one thread: torch's many short parallel passes wait for
each other's threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baseline import Comparison, report
from benchmarks.kernels.linear_jsd import Inputs, Shape, fused, make_inputs, run
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head import one_pass

SHAPE = Shape("V=151,936", 512, 64, 151_936, 896, 512, 1)
PRODUCTS = ("mm", "addmm", "addmm_")
WAYS = ("native", "torch")


class Seconds(NamedTuple):
    """Process CPU time and wall time."""

    cpu: float
    wall: float


class Stopwatch:
    """Adds up the time of some calls."""

    def __init__(self) -> None:
        self.total = Seconds(0.0, 0.0)

    def call(self, function: Callable, *arguments: object, **options: object) -> object:
        """function(*arguments, **options), timed."""
        started = time.process_time(), time.perf_counter()
        result = function(*arguments, **options)
        self.total = Seconds(
            self.total.cpu + time.process_time() - started[0],
            self.total.wall + time.perf_counter() - started[1],
        )
        return result


class Products(TorchDispatchMode):
    """Times the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = Stopwatch()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Called by torch for every operation."""
        if func.overloadpacket.__name__ in PRODUCTS:
            return self.watch.call(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def measure(way: str, loss: Callable, inputs: Inputs) -> dict[str, Seconds]:
    """One forward and backward: the time of all, of the visits and of the products."""
    whole, visits, products = Stopwatch(), Stopwatch(), Products()
    with ExitStack() as stack:
        if way == "torch":
            stack.enter_context(mock.patch.object(one_pass, "native_obstacle", return_value="asked for"))
        for name in ("visit_native_block", "visit_torch_block"):
            visit = getattr(one_pass, name)
            stack.enter_context(
                mock.patch.object(
                    one_pass, name, lambda *a, visit=visit, **options: visits.call(visit, *a, **options)
                )
            )
        if way == "native":  # of which there are few: a mode costs time at every operation
            stack.enter_context(products)
        whole.call(run, loss, inputs, SHAPE)
    return {"whole": whole.total, "visits": visits.total, "products": products.watch.total}


def check(loss: Callable, inputs: Inputs) -> None:
    """Print how far the gradients of the two are apart."""
    with mock.patch.object(one_pass, "native_obstacle", return_value="asked for"):
        expected = run(loss, inputs, SHAPE)
    found = run(loss, inputs, SHAPE)
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, expected)]
    print(f"gradients of native and torch differ by {errors[0]:.1e} (hidden), {errors[1]:.1e} (weight)")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--top-k", type=int, help="of the divergence; the full vocabulary unless given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inputs = make_inputs(SHAPE, getattr(torch, arguments.dtype))
    divergence = Divergence(kind="jsd", beta=0.5, temperature=1.0, top_k=arguments.top_k)

    def loss(inputs: Inputs, shape: Shape) -> torch.Tensor:
        return fused(inputs, shape, divergence)

    check(loss, inputs)
    rounds = [{way: measure(way, loss, inputs) for way in WAYS} for _ in range(arguments.rounds)]
    comparisons = []
    for clock in Seconds._fields:

        def median(way: str, part: str, clock: str = clock) -> float:
            return statistics.median(getattr(r[way][part], clock) for r in rounds)

        comparisons += [
            Comparison(
                name=f"head's {part}, {arguments.dtype}",
                ours=median("native", part),
                theirs=median("torch", part),
                unit=f"s {clock}",
                against="torch",
            )
            for part in ("visits", "whole")
        ]
        share = median("native", "products") / median("native", "whole")
        print(f"{clock}: products {median('native', 'products'):.3f} s, {share:.1%} of the head")
    kept = "" if arguments.top_k is None else f", top_k {arguments.top_k}"
    name = f"head_visits, {arguments.dtype}{kept}, {arguments.threads} threads"
    report(name, comparisons, arguments.json)


if __name__ == "__main__":
    main()
