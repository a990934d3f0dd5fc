"""Times on a GPU, and its floors: what it copies and multiplies in a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def median_ms(variants: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Device time of each variant in milliseconds, the median over rounds in which every variant runs once.
    One that does not fit into memory is left out, with a line that says so."""
    times: dict[str, list[float]] = {}
    for name, run in variants.items():  # warm up: allocator, compilation
        try:
            for _ in range(2):
                run()
            times[name] = []
        except torch.OutOfMemoryError:
            print(f"    {name}: does not fit into memory", flush=True)
            torch.cuda.empty_cache()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name in times:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variants[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_mib(run: Callable[[], object]) -> float:
    """Memory of one run over what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bytes_a_ms(rounds: int) -> float:
    """Bytes read plus bytes written by a copy of 2 GiB, in a millisecond."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]


def matmul_flops_a_ms(rounds: int) -> float:
    """Of a square bfloat16 product, 8192 wide."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median_ms({"product": lambda: a @ b}, rounds=rounds)["product"]
