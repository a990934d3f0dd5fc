"""The native library for CPUs: found, loaded, described and called through ctypes. setup.py compiles it
from kernels/csrc.

The library knows raw pointers only, so one file serves every version of Python and torch. torch is imported
first: both then share its OpenMP threads. Without a library (no compiler at installation) everything here
still imports and `LIBRARY` is None.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sd.ops.native import cuda_library
from megatron_sd.ops.native.structs import RowPairs, RowsTask

LIBRARY_PATH = Path(__file__).resolve().parents[2] / "_C.so"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # the library's numbering, oldest first
CALLS = (
    *("jsd_rows", "jsd_normalisers", "jsd_sums", "jsd_gradient", "scatter_rows"),
    *("head_values", "head_gradient"),
    "linear",
)


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What the native libraries are. library: the CPUs' file, None without one, and then `missing` says
    why. instruction_set: the newest that this processor and the library both have. compiler: its version.
    cuda_*: the same of the GPUs' file; cuda_architectures: what it holds code for, cuda_toolkit: nvcc's
    version."""

    library: Path | None
    missing: str
    instruction_set: str
    openmp: bool
    compiler: str
    cuda_library: Path | None
    cuda_missing: str
    cuda_architectures: str
    cuda_toolkit: str


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library at `path` and "", or None and why there is none."""
    if not path.is_file():
        return None, f"{path} does not exist: install again with a C++ compiler at hand (pip install .)"
    try:
        library = ctypes.CDLL(str(path))
        for name in CALLS:
            call = getattr(library, f"megatron_sd_{name}")
            call.argtypes, call.restype = [ctypes.c_void_p], None
        library.megatron_sd_compiler.restype = ctypes.c_char_p
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    except AttributeError as error:
        return None, f"{path} is not of this version, install again (pip install .): {error}"
    return library, ""


LIBRARY, MISSING = load(LIBRARY_PATH)
INSTRUCTION_SET = INSTRUCTION_SETS[LIBRARY.megatron_sd_instruction_set()] if LIBRARY else INSTRUCTION_SETS[0]


def build_info() -> BuildInfo:
    """Describe the native libraries of this installation."""
    return BuildInfo(
        library=LIBRARY_PATH if LIBRARY else None,
        missing=MISSING,
        instruction_set=INSTRUCTION_SET,
        openmp=bool(LIBRARY and LIBRARY.megatron_sd_has_openmp()),
        compiler=LIBRARY.megatron_sd_compiler().decode() if LIBRARY else "",
        cuda_library=cuda_library.LIBRARY_PATH if cuda_library.LIBRARY else None,
        cuda_missing=cuda_library.MISSING,
        cuda_architectures=cuda_library.architectures(),
        cuda_toolkit=cuda_library.toolkit(),
    )


def scratch(pairs: RowPairs, task: RowsTask, *, keeps_scores: bool) -> Tensor | None:
    """One row a thread, if a gradient's scores have to be kept and its own row cannot hold them."""
    del task
    return (
        torch.empty(torch.get_num_threads(), pairs.vocabulary, dtype=torch.float32) if keeps_scores else None
    )


def listed(rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """The list as it is: the library sorts it."""
    del num_rows
    return rows, None


def run(call: str, task: ctypes.Structure, *, device: torch.device, instruction_set: str | None) -> None:
    """One call of the library, on torch's threads. task: what the call takes, with fields num_threads and
    instruction_set. Raises ValueError for an instruction set that this processor has not."""
    del device
    task.num_threads, task.instruction_set = (
        torch.get_num_threads(),
        _number_of(instruction_set or INSTRUCTION_SET),
    )
    getattr(LIBRARY, f"megatron_sd_{call}")(ctypes.byref(task))


def _number_of(instruction_set: str) -> int:
    number = INSTRUCTION_SETS.index(instruction_set)
    if number > INSTRUCTION_SETS.index(INSTRUCTION_SET):
        raise ValueError(
            f"instruction_set is {instruction_set!r}, expected at most {INSTRUCTION_SET!r} on this processor"
        )
    return number
