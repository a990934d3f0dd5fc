"""The divergence of 64 rows over 151,936 entries, forward and backward: native code against eager and
compiled torch, in turn.

    python -m benchmarks.kernels.jsd [--json FILE] [--rounds 3] [--no-compile]

The peer is TRL's generalised JSD formula (log_softmax of both, the mixture by logsumexp, two kl_div with
log targets), in the logits' bfloat16 and upcast to float32, eager and, where there is a C++ compiler,
through torch.compile (a minute more). Times are process CPU time, medians over rounds in which every
variant runs once. "extra" is the peak of resident memory over what was there before, sampled every
millisecond. The figures that this operation has to reach are printed as met or not met.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.baseline import Comparison, report
from benchmarks.resident import extra_mib
from megatron_sd.ops import build_info
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd import jsd_rows

NUM_ROWS, VOCABULARY, BETA = 64, 151_936, 0.5
# Times that the native code in bfloat16 has to be faster than its peers, and MiB a thread that it may take
# beside the gradient.
REQUIRED_RATIOS = {"eager, bf16": 20.0, "eager, upcast": 40.0, "compiled, upcast": 10.0}
ALLOWED_MIB_A_THREAD = 1.0


def trl_formula(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Generalised JSD as TRL's GKD writes it, in the dtype of its inputs; a scalar, the sum over rows."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    mixture = torch.logsumexp(torch.stack([log_q + math.log(1 - BETA), log_p + math.log(BETA)]), 0)
    to_teacher = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    return (BETA * to_teacher + (1 - BETA) * to_student).sum()


def upcast(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The same after a copy of both to float32."""
    return trl_formula(student.float(), teacher.float())


def through_the_door(impl: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """jsd_rows of every row with weight 1, summed."""
    rows, weights = torch.arange(NUM_ROWS), torch.ones(NUM_ROWS)
    divergence = Divergence(kind="jsd", beta=BETA, temperature=1.0)

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return jsd_rows(student, teacher, rows, rows, weights, divergence=divergence, impl=impl).values.sum()

    return loss


def cpu_seconds(loss: Callable, student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Process CPU time of one forward and backward; the gradient is freed afterwards."""
    started = time.process_time()
    loss(student, teacher).backward()
    elapsed = time.process_time() - started
    student.grad = None
    return elapsed


def make_inputs() -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The exact divergence of the rounded logits, and student and teacher by the dtype they come in."""
    generator = torch.Generator().manual_seed(0)
    student = 3.0 * torch.randn(NUM_ROWS, VOCABULARY, generator=generator)
    teacher = student + 0.5 * torch.randn(NUM_ROWS, VOCABULARY, generator=generator)
    pairs = zip(student.split(8), teacher.split(8), strict=True)
    exact = sum(trl_formula(a.bfloat16().double(), b.bfloat16().double()).item() for a, b in pairs)
    return exact, {
        "bf16": (student.bfloat16().requires_grad_(), teacher.bfloat16()),
        "fp32": (student.bfloat16().float().requires_grad_(), teacher.bfloat16().float()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    exact, inputs = make_inputs()
    variants = {
        "native, bf16": (through_the_door("cpp"), "bf16"),
        "native, fp32": (through_the_door("cpp"), "fp32"),
        "eager, bf16": (trl_formula, "bf16"),
        "eager, upcast": (upcast, "bf16"),
        "eager, fp32": (trl_formula, "fp32"),
        "reference, fp32": (through_the_door("torch"), "fp32"),
    }
    if not options.no_compile and any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        variants["compiled, bf16"] = (torch.compile(trl_formula), "bf16")
        variants["compiled, upcast"] = (torch.compile(upcast), "bf16")
    for loss, kind in variants.values():  # warm up
        cpu_seconds(loss, *inputs[kind])
    memory = {
        name: extra_mib(lambda loss=loss, kind=kind: cpu_seconds(loss, *inputs[kind]))
        for name, (loss, kind) in variants.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, (loss, kind) in variants.items():
            seconds[name].append(cpu_seconds(loss, *inputs[kind]))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"N={NUM_ROWS}, V={VOCABULARY}, beta={BETA}, {torch.get_num_threads()} threads; {build_info()}")
    for name, (loss, kind) in variants.items():
        with torch.no_grad():
            error = loss(*inputs[kind]).item() / exact - 1
        print(
            f"{name:<18} {median[name] * 1e3:8.1f} ms CPU (least {min(seconds[name]) * 1e3:.1f})  extra"
            f" {memory[name]:6.0f} MiB  value off by {error:+.1e}"
        )
    comparisons = [
        Comparison(
            name=f"JSD, {ours}",
            ours=median[ours] * 1e3,
            theirs=median[theirs] * 1e3,
            unit="ms CPU",
            against=theirs,
        )
        for ours, peers in (
            ("native, bf16", ("eager, bf16", "eager, upcast", "compiled, bf16", "compiled, upcast")),
            ("native, fp32", ("eager, fp32", "reference, fp32")),
        )
        for theirs in peers
        if theirs in median
    ]
    report("jsd", comparisons, options.json)
    print_verdicts(median, memory)


def print_verdicts(seconds: dict[str, float], memory: dict[str, float]) -> None:
    """Each required figure, met or not; peers that did not run are named."""
    for peer, required in REQUIRED_RATIOS.items():
        if peer not in seconds:
            print(f"not measured: >= {required:g}x against {peer}")
            continue
        ratio = seconds[peer] / seconds["native, bf16"]
        print(
            f"{'met' if ratio >= required else 'NOT met'}: >= {required:g}x against {peer} (found"
            f" {ratio:.1f}x)"
        )
    gradient = NUM_ROWS * VOCABULARY * 2 / 2**20
    beside = memory["native, bf16"] - gradient
    allowed = ALLOWED_MIB_A_THREAD * torch.get_num_threads()
    verdict = "met" if beside <= allowed else "NOT met"
    print(f"{verdict}: <= {allowed:g} MiB beside the gradient's {gradient:.1f} (found {beside:.1f})")


if __name__ == "__main__":
    main()
