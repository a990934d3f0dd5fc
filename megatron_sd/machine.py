"""What this machine computes with, told by files alone: configuration is read before any framework is
loaded. And its memory, and which optional packages it has."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
from pathlib import Path

from megatron_sd.errors import ConfigError

logger = logging.getLogger(__name__)
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86's in "flags", Arm's in "Features"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver."""
    return Path("/dev/nvidiactl").exists()


@functools.cache
def preferred_dtype() -> str:
    """What model.dtype auto stands for: bfloat16 on a GPU and on processors with instructions for it, else
    float32, since emulated bfloat16 is many times slower. Said once."""
    flags = processor_flags(Path("/proc/cpuinfo"))
    if has_gpu():
        found, why = "bfloat16", "there is a GPU"
    elif flags & _BFLOAT16_FLAGS:
        found, why = "bfloat16", "the processor has instructions for it"
    else:
        found, why = "float32", "no GPU, and this processor would have to emulate bfloat16"
    logger.info("model.dtype auto is %s: %s", found, why)
    return found


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the process's start; None when there is no such process, or it only waits to
    be reaped."""
    with contextlib.suppress(OSError):
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def give_back_memory() -> None:
    """Return to the system what this process has freed in host memory: the C library keeps it, as much as
    the model's size after loading. Nothing where that library has no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor_flags(cpuinfo: Path) -> frozenset[str]:
    """What /proc/cpuinfo lists for the first processor; nothing where there is no such file."""
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def require_extra(module: str, extra: str, key: str) -> None:
    """Raise ConfigError when the module of an extra is not installed. key: of the configuration that
    needs it."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{key}: found {extra}, but its package {module} is not installed here, expected it from `pip install"
            f" 'megatron-sd[{extra}]'` (`pip install .[{extra}]` in a checkout)"
        )
