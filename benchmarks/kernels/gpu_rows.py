"""The divergence of rows on a GPU: native against TRL's formula, eager and compiled, and Liger-Kernel where
it is installed.

Floors count what must move: each logit once in, each gradient once out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.kernels.gpu_timing import median_ms, peak_mib
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.native import calls

VOCABULARY, BETA = 151_936, 0.5
NUM_ROWS = (512, 1024, 2048, 4096, 8192)
# (student dtype, teacher dtype, the teacher's matrix holds differences, gradient dtype): bytes an entry
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
    "fp32": (torch.float32, torch.float32, False, torch.float32),
    "fp32, bf16 gradient": (torch.float32, torch.float32, False, torch.bfloat16),
    "fp32 with bf16 differences": (torch.float32, torch.bfloat16, True, torch.bfloat16),
}


def trl_formula(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The divergence as TRL's GKD writes it, in the dtype of its inputs; a scalar, the sum over rows."""
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    mixture = torch.logsumexp(torch.stack([log_q + math.log(1 - BETA), log_p + math.log(BETA)]), 0)
    to_teacher = F.kl_div(mixture, log_p, reduction="sum", log_target=True)
    return BETA * to_teacher + (1 - BETA) * F.kl_div(mixture, log_q, reduction="sum", log_target=True)


def upcast_formula(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The same after a copy of both to float32."""
    return trl_formula(student.float(), teacher.float(), divergence)


def liger_formula() -> Callable[[Tensor, Tensor, str], Tensor] | None:
    """Liger-Kernel's JSD on log-probabilities, None where it is not installed. Its betas 0 and 1 are the KL
    divergences."""
    try:
        from liger_kernel.transformers import LigerJSD
    except ImportError:
        return None
    losses = {
        name: LigerJSD(beta=beta) for name, beta in (("jsd", BETA), ("forward_kl", 0.0), ("reverse_kl", 1.0))
    }

    def formula(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
        log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
        return losses[divergence](log_q, log_p) * len(student)

    return formula


def native(pair: tuple[Tensor, Tensor], kind: tuple, divergence: str) -> Callable[[], object]:
    """Values and gradients of every row, in one visit."""
    student, teacher = pair
    rows = torch.arange(len(student), device="cuda")
    chosen = Divergence(kind=divergence, beta=BETA, temperature=1.0)
    return lambda: calls.native_divergence(
        student,
        teacher,
        rows,
        rows,
        divergence=chosen,
        with_gradient=True,
        gradient_dtype=kind[3],
        teacher_is_difference=kind[2],
    )


def forward_and_backward(
    formula: Callable, pair: tuple[Tensor, Tensor], divergence: str
) -> Callable[[], object]:
    """What autograd makes of a formula."""
    student, teacher = pair[0].detach().requires_grad_(), pair[1]
    return lambda: torch.autograd.grad(formula(student, teacher, divergence), student)


def pair_of(kind: tuple, num_rows: int) -> tuple[Tensor, Tensor]:
    """Logits of a sharp distribution, and a teacher half a nat away."""
    student = (3.0 * torch.randn(num_rows, VOCABULARY, device="cuda")).to(kind[0])
    difference = (0.5 * torch.randn(num_rows, VOCABULARY, device="cuda")).to(kind[1])
    return student, difference if kind[2] else (student + difference).to(kind[1])


def bytes_an_entry(kind: tuple) -> int:
    """Of both inputs and the gradient."""
    return kind[0].itemsize + kind[1].itemsize + kind[3].itemsize


def measure(copy_bytes_a_ms: float, *, rounds: int, compiled: bool) -> list[dict]:
    """Print a line a variant; return the figures."""
    figures = []
    peers = {"eager": trl_formula, "eager, upcast": upcast_formula}
    if compiled:
        peers |= {"compiled": torch.compile(trl_formula), "compiled, upcast": torch.compile(upcast_formula)}
    if liger := liger_formula():
        peers["liger"] = liger
    else:
        print("  liger_kernel is not installed: it is not measured")
    for name, kind in KINDS.items():
        for divergence in ("jsd", "forward_kl", "reverse_kl"):
            for num_rows in NUM_ROWS if name == "bf16" or divergence == "jsd" else (4096,):
                pair = pair_of(kind, num_rows)
                variants = {"native": native(pair, kind, divergence)}
                # the peers' memory allows no more on every card
                if num_rows == 2048 and name in ("bf16", "fp32"):
                    variants |= {
                        peer: forward_and_backward(formula, pair, divergence)
                        for peer, formula in peers.items()
                    }
                floor_ms = num_rows * VOCABULARY * bytes_an_entry(kind) / copy_bytes_a_ms
                for variant, ms in median_ms(variants, rounds=rounds).items():
                    peak = peak_mib(variants[variant])
                    case = f"{name:<28} {divergence:<10} N={num_rows:<5} {variant:<17}"
                    share = f"{floor_ms / ms:5.1%} of the floor ({bytes_an_entry(kind)} B an entry)"
                    print(f"  {case} {ms:8.3f} ms  {share}  extra {peak:7.0f} MiB", flush=True)
                    figures.append({
                        "kind": name, "divergence": divergence, "num_rows": num_rows, "variant": variant, "ms": ms,
                        "share_of_floor": floor_ms / ms, "extra_mib": peak,
                    })  # fmt: skip
                del pair, variants
                torch.cuda.empty_cache()
    return figures
