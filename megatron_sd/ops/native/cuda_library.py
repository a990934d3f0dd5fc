"""The native library for NVIDIA GPUs: found, loaded and called through ctypes. Its source is
kernels/csrc/jsd_cuda.cu.

A file of its own beside the CPU library, with the CUDA runtime inside: it loads on machines without a GPU
or driver, where calls fail with CUDA's own message. It knows nothing of torch; work goes to torch's current
stream, and no call waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megatron_sd.ops.native.structs import RowPairs, RowsTask, ScatterTask

LIBRARY_PATH = Path(__file__).resolve().parents[2] / "_C_cuda.so"
CALLS = ("jsd_rows", "jsd_normalisers", "jsd_sums", "jsd_gradient", "scatter_rows")
DTYPE_PAIRS = {  # (student, teacher, teacher_is_difference) that the kernels are compiled for
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float32, torch.bfloat16, True),
}


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library at `path` and "", or None and why there is none."""
    if not path.is_file():
        return (
            None,
            f"{path} does not exist: install again with nvcc at hand (MEGATRON_SD_CUDA=1 pip install .)",
        )
    try:
        library = ctypes.CDLL(str(path))
        for name in CALLS:
            getattr(library, f"megatron_sd_cuda_{name}").argtypes = [
                ctypes.c_void_p,
                ctypes.c_int,
                ctypes.c_void_p,
            ]
        library.megatron_sd_cuda_architectures.restype = ctypes.c_char_p
        library.megatron_sd_cuda_error.restype = ctypes.c_char_p
        library.megatron_sd_cuda_scratch_bytes.argtypes = [ctypes.c_void_p]
        library.megatron_sd_cuda_scratch_bytes.restype = ctypes.c_int64
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    except AttributeError as error:
        return (
            None,
            f"{path} is not of this version, install again (MEGATRON_SD_CUDA=1 pip install .): {error}",
        )
    return library, ""


LIBRARY, MISSING = load(LIBRARY_PATH)


def architectures() -> str:
    """What the library was compiled for, as in "80, 90a, 100a, PTX 100"; "" without one."""
    return LIBRARY.megatron_sd_cuda_architectures().decode() if LIBRARY else ""


def toolkit() -> str:
    """Version of the CUDA toolkit that compiled the library, as in "13.0"; "" without one."""
    number = LIBRARY.megatron_sd_cuda_version() if LIBRARY else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


@functools.cache
def obstacle(device_index: int) -> str:
    """What keeps the library from running on this CUDA device, "" if nothing does."""
    error = LIBRARY.megatron_sd_cuda_ready(device_index) if LIBRARY else 0
    return f"CUDA says: {_message(error)} (the library has code for {architectures()})" if error else MISSING


def scratch(pairs: RowPairs, task: RowsTask, *, keeps_scores: bool) -> Tensor | None:
    """Memory that a call needs for partial results; keeps_scores is of no concern here."""
    del keeps_scores
    num_bytes = _library().megatron_sd_cuda_scratch_bytes(ctypes.byref(task))
    return torch.empty(num_bytes, dtype=torch.uint8, device=pairs.student.device)


def listed(rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(list entries sorted by their row, in list order within a row; where each row's begin [num_rows +
    1])."""
    ordered = torch.sort(rows, stable=True)
    bounds = torch.arange(num_rows + 1, device=rows.device, dtype=rows.dtype)
    return ordered.indices, torch.searchsorted(ordered.values, bounds)


def run(
    call: str, task: RowsTask | ScatterTask, *, device: torch.device, instruction_set: str | None
) -> None:
    """Queue one call of the library on torch's current stream. Raises RuntimeError with CUDA's message."""
    if instruction_set is not None:
        raise ValueError(
            f"instruction_set is {instruction_set!r}, expected None: it chooses among CPU programs"
        )
    index, stream = place(device)
    error = getattr(LIBRARY, f"megatron_sd_cuda_{call}")(ctypes.byref(task), index, stream)
    if error:
        raise RuntimeError(
            f"{call} on {device} failed: {_message(error)}; the library has code for {architectures()}"
        )


def place(device: torch.device) -> tuple[int, int]:
    """Device number, and the handle of torch's current stream there."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _message(error: int) -> str:
    return f"{_library().megatron_sd_cuda_error(error).decode()} ({error})"


def _library() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError(MISSING)
    return LIBRARY
