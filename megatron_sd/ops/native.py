"""The native library: found, loaded, described and called through ctypes. Its sources are kernels/csrc; setup.py compiles them.

The library knows raw pointers only, so one file serves every version of Python and torch. torch is imported first: both then
share its OpenMP threads. Without a library (no compiler at installation) everything here still imports and `LIBRARY` is None.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_C.so"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # the library's numbering, oldest first
DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")  # the library's numbering
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What the native library is. library: its file, None without one, and then `missing` says why. instruction_set: the newest
    that this processor and the library both have. compiler: its version."""

    library: Path | None
    missing: str
    instruction_set: str
    openmp: bool
    compiler: str


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("element_type", ctypes.c_int32)]


class _RowsTask(ctypes.Structure):
    _fields_ = [
        ("student", _Matrix),
        ("teacher", _Matrix),
        ("gradient", _Matrix),
        ("student_rows", ctypes.c_void_p),
        ("teacher_rows", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("beta", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("divergence", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


class _ScatterTask(ctypes.Structure):
    _fields_ = [
        ("gradient", _Matrix),
        ("out", _Matrix),
        ("rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_out_rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("instruction_set", ctypes.c_int32),
    ]


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library at `path` and "", or None and why there is none."""
    if not path.is_file():
        return None, f"{path} does not exist: install again with a C++ compiler at hand (pip install .)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"
    library.megatron_sd_compiler.restype = ctypes.c_char_p
    for call in (library.megatron_sd_jsd_rows, library.megatron_sd_scatter_rows):
        call.argtypes, call.restype = [ctypes.c_void_p], None
    return library, ""


LIBRARY, MISSING = load(LIBRARY_PATH)
INSTRUCTION_SET = INSTRUCTION_SETS[LIBRARY.megatron_sd_instruction_set()] if LIBRARY else INSTRUCTION_SETS[0]


def build_info() -> BuildInfo:
    """Describe the native library of this installation."""
    return BuildInfo(
        library=LIBRARY_PATH if LIBRARY else None,
        missing=MISSING,
        instruction_set=INSTRUCTION_SET,
        openmp=bool(LIBRARY and LIBRARY.megatron_sd_has_openmp()),
        compiler=LIBRARY.megatron_sd_compiler().decode() if LIBRARY else "",
    )


def jsd_rows(  # noqa: PLR0913 (the whole operation)
    student: Tensor,
    teacher: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    *,
    divergence: str,
    beta: float,
    temperature: float,
    with_gradient: bool,
    instruction_set: str,
) -> tuple[Tensor, Tensor]:
    """Divergences [N] float32 of the listed rows, and their gradients [N, V] in the student's dtype ([0, V] if not wanted).

    student [S, V], teacher [T, V]: float32 or bfloat16 on the CPU. student_rows, teacher_rows: [N] integer, in range (the caller
    has looked). A row that is all -inf, or holds a NaN, gives NaN in both.
    """
    student, teacher = _rows_in_memory(student), _rows_in_memory(teacher)
    student_rows, teacher_rows = student_rows.to(torch.int64).contiguous(), teacher_rows.to(torch.int64).contiguous()
    num_rows, vocabulary = len(student_rows), student.shape[1]
    num_threads = torch.get_num_threads()
    values = torch.empty(num_rows, dtype=torch.float32)
    gradient = torch.empty(num_rows if with_gradient else 0, vocabulary, dtype=student.dtype)
    needs_scratch = with_gradient and student.dtype != torch.float32 and divergence != "forward_kl"
    scratch = torch.empty(num_threads, vocabulary, dtype=torch.float32) if needs_scratch else None
    task = _RowsTask(
        student=_matrix(student),
        teacher=_matrix(teacher),
        gradient=_matrix(gradient) if with_gradient else _Matrix(None, 0, 0),
        student_rows=student_rows.data_ptr(),
        teacher_rows=teacher_rows.data_ptr(),
        values=values.data_ptr(),
        scratch=None if scratch is None else scratch.data_ptr(),
        num_rows=num_rows,
        vocabulary=vocabulary,
        beta=beta,
        temperature=temperature,
        divergence=DIVERGENCES.index(divergence),
        num_threads=num_threads,
        instruction_set=_number_of(instruction_set),
    )
    if num_rows:
        LIBRARY.megatron_sd_jsd_rows(ctypes.byref(task))
    return values, gradient


def scatter_rows(gradient: Tensor, rows: Tensor, scales: Tensor, *, num_rows: int, instruction_set: str) -> Tensor:
    """[num_rows, V], row r = sum over i with rows[i] == r of scales[i] * gradient[i], summed in float32, in gradient's dtype.

    gradient: [N, V] float32 or bfloat16. rows: [N] integer, in range. scales: [N].
    """
    gradient, rows = _rows_in_memory(gradient), rows.to(torch.int64).contiguous()
    scales = scales.to(torch.float32).contiguous()
    out = torch.empty(num_rows, gradient.shape[1], dtype=gradient.dtype)
    task = _ScatterTask(
        gradient=_matrix(gradient),
        out=_matrix(out),
        rows=rows.data_ptr(),
        scales=scales.data_ptr(),
        num_rows=len(rows),
        num_out_rows=num_rows,
        vocabulary=gradient.shape[1],
        num_threads=torch.get_num_threads(),
        instruction_set=_number_of(instruction_set),
    )
    LIBRARY.megatron_sd_scatter_rows(ctypes.byref(task))
    return out


def _rows_in_memory(matrix: Tensor) -> Tensor:
    """The matrix with adjacent columns; copied only if it has to be."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _matrix(matrix: Tensor) -> _Matrix:
    return _Matrix(matrix.data_ptr(), matrix.stride(0), ELEMENT_TYPES[matrix.dtype])


def _number_of(instruction_set: str) -> int:
    number = INSTRUCTION_SETS.index(instruction_set)
    if number > INSTRUCTION_SETS.index(INSTRUCTION_SET):
        raise ValueError(f"instruction_set is {instruction_set!r}, expected at most {INSTRUCTION_SET!r} on this processor")
    return number
