"""Peak figures of GPUs, from their makers' data sheets: dense bfloat16 products, memory, and the links
inside a node."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_sd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """memory_gib: that a process can allocate. tflops: dense bfloat16. memory_tb_s: bandwidth. link_gb_s:
    one direction of NVLink, or of PCIe where there is none."""

    name: str
    memory_gib: float
    tflops: float
    memory_tb_s: float
    link_gb_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="rtx4090", memory_gib=23.6, tflops=165, memory_tb_s=1.01, link_gb_s=32),
        Gpu(name="l40s", memory_gib=44.4, tflops=362, memory_tb_s=0.86, link_gb_s=32),
        Gpu(name="a100-40", memory_gib=39.4, tflops=312, memory_tb_s=1.56, link_gb_s=300),
        Gpu(name="a100-80", memory_gib=79.2, tflops=312, memory_tb_s=2.04, link_gb_s=300),
        Gpu(name="h100", memory_gib=79.1, tflops=989, memory_tb_s=3.35, link_gb_s=450),
        Gpu(name="h200", memory_gib=139.8, tflops=989, memory_tb_s=4.8, link_gb_s=450),
        Gpu(name="b200", memory_gib=178.3, tflops=2250, memory_tb_s=8.0, link_gb_s=900),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, in any case. Raises ConfigError that lists those known."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    close = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {close[0]}?" if close else "add its data sheet's figures to launch/planner/gpus.py"
    raise ConfigError(f"gpu: found {name!r}, expected one of {', '.join(GPUS)}; {hint}")
