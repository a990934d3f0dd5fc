"""Who holds which elements of a model's weights: the trainer's ZeRO-3 shards and the workers'
tensor-parallel shards, as data.

Offsets and lengths count elements. A tensor of any rank is seen as a matrix of shape[0] rows; a vector has
rows of one element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sd.errors import ReshardError


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor's name, shape and type ("float32", "bfloat16", ...).

    Example: TensorSpec(name="model.norm.weight", shape=(3584,), dtype="bfloat16")
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def num_columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Weights cut as ZeRO-3 cuts them: rank r of `world_size` owns the flat elements [r * part, (r + 1) *
    part) of every parameter, row-major, part = ceil(numel / world_size); the last ranks may own less, or
    nothing.

    parameters: whole, by their Hugging Face names, in the order in which they are sent; a tied parameter
    comes once.
    """

    parameters: tuple[TensorSpec, ...]
    world_size: int

    def owned(self, numel: int, rank: int) -> tuple[int, int]:
        """[start, stop) of what a rank owns of a parameter of `numel` elements."""
        part = -(-numel // self.world_size)
        return min(rank * part, numel), min((rank + 1) * part, numel)


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A rectangle of a trainer's parameter and where its upper left corner lands in a worker's tensor.

    Example: the second of two workers' part of an up_proj of [8, 6] in a fused gate_up_proj of [8, 6]:
    Rectangle(parameter="up_proj.weight", rows=(4, 8), columns=(0, 6), at_row=4, at_column=0)
    """

    parameter: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    at_row: int = 0
    at_column: int = 0

    @property
    def numel(self) -> int:
        """Elements that move."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True, kw_only=True)
class WorkerTensor:
    """A worker's tensor and the pieces it is made of; its last `num_padding_rows` rows come from nobody and
    are zero."""

    spec: TensorSpec
    pieces: tuple[Rectangle, ...]
    num_padding_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerLayout:
    """What the worker of one tensor-parallel rank holds. Every element comes from exactly one place
    (`check_tiling`)."""

    tp_rank: int
    tp_size: int
    tensors: tuple[WorkerTensor, ...]

    @property
    def numel(self) -> int:
        """Elements sent to the worker; padding is not sent."""
        return sum(piece.numel for tensor in self.tensors for piece in tensor.pieces)


@dataclass(frozen=True, kw_only=True)
class WorkerId:
    """A worker among `num_replicas` engines of `tp_size` workers each."""

    replica: int
    tp_rank: int
    tp_size: int

    @property
    def number(self) -> int:
        """Among the workers of all replicas."""
        return self.replica * self.tp_size + self.tp_rank

    def __str__(self) -> str:
        return (
            f"worker {self.number} (replica {self.replica}, tensor-parallel rank {self.tp_rank} of"
            f" {self.tp_size})"
        )


def check_tiling(worker: WorkerLayout) -> None:
    """Raise ReshardError unless the pieces of every tensor, and its padding, cover each element once."""
    for tensor in worker.tensors:
        spec = tensor.spec
        num_rows, num_columns = spec.shape[0] - tensor.num_padding_rows, spec.num_columns
        rectangles = [
            (
                p.at_row,
                p.at_row + p.rows[1] - p.rows[0],
                p.at_column,
                p.at_column + p.columns[1] - p.columns[0],
            )
            for p in tensor.pieces
        ]
        inside = all(0 <= a <= b <= num_rows and 0 <= c <= d <= num_columns for a, b, c, d in rectangles)
        disjoint = not any(
            _overlap(one, other) for n, one in enumerate(rectangles) for other in rectangles[:n]
        )
        found = sum(piece.numel for piece in tensor.pieces)
        if not (inside and disjoint and found == num_rows * num_columns):
            raise ReshardError(
                f"{spec.name} of tensor-parallel rank {worker.tp_rank}: found pieces of {found} elements at"
                f" {rectangles}, expected a tiling of {num_rows} x {num_columns}: the family's description in"
                " resharding/names.py is wrong"
            )


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1]) and max(one[2], other[2]) < min(one[3], other[3])


def check_parameters(source: ShardLayout, expected: Sequence[TensorSpec]) -> None:
    """Raise ReshardError naming the first parameters that trainer and engine do not both have, or have in
    another form."""
    differences = spec_differences(
        {spec.name: spec for spec in source.parameters}, {spec.name: spec for spec in expected}
    )
    twice = [name for name, count in Counter(spec.name for spec in source.parameters).items() if count > 1]
    differences += [f"{name}: the trainer has it twice" for name in twice]
    if differences:
        raise ReshardError(
            f"trainer and engine differ in {len(differences)} parameters: {'; '.join(differences[:3])}. Build"
            " both from the same model directory and dtype; tied embeddings must be tied on both sides"
        )


def check_worker(worker: WorkerId, layout: WorkerLayout, found: Mapping[str, TensorSpec]) -> None:
    """Raise ReshardError naming the first tensors in which a worker is not what its layout says."""
    differences = spec_differences(found, {tensor.spec.name: tensor.spec for tensor in layout.tensors})
    if differences:
        raise ReshardError(
            f"{worker} differs from its layout in {len(differences)} tensors: {'; '.join(differences[:3])}."
            " Start it from the policy's model directory, with its dtype and without quantisation"
        )


def spec_differences(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> list[str]:
    """One line for every name that is missing, unexpected, or of another shape or type."""
    lines = [f"{name}: found, expected no such tensor" for name in found if name not in expected]
    for name, spec in expected.items():
        if name not in found:
            lines.append(f"{name}: missing, expected {_form(spec)}")
        elif (found[name].shape, found[name].dtype) != (spec.shape, spec.dtype):
            lines.append(f"{name}: found {_form(found[name])}, expected {_form(spec)}")
    return lines


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"
