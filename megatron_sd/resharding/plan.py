"""Which runs of elements go from which trainer rank to which worker: pure arithmetic on two layouts.

A plan holds no list of runs: those between one rank and one worker (a link) follow from the layouts on
demand. A column shard of a row-major matrix is thousands of short runs at equal distances, and one `Slice`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_sd.errors import ReshardError
from megatron_sd.resharding.layout import Rectangle, ShardLayout, TensorSpec, WorkerLayout

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Slice(NamedTuple):
    """`num_runs` runs of `run_length` elements. Run n starts at source_offset + n * source_stride in the
    rank's own shard of `parameter`, and at target_offset + n * target_stride in the worker's `tensor`, both
    flat."""

    parameter: str
    tensor: str
    source_offset: int
    source_stride: int
    target_offset: int
    target_stride: int
    run_length: int
    num_runs: int

    @property
    def numel(self) -> int:
        """Elements that move."""
        return self.run_length * self.num_runs


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """From the ranks of `source` to `num_replicas` times the workers of `workers`; worker n is
    tensor-parallel rank n % tp_size of replica n // tp_size. Everything is of one type."""

    source: ShardLayout
    workers: tuple[WorkerLayout, ...]
    num_replicas: int

    @property
    def num_workers(self) -> int:
        """Of all replicas."""
        return len(self.workers) * self.num_replicas

    @property
    def dtype(self) -> str:
        """Of every tensor."""
        return self.source.parameters[0].dtype

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]

    def layout_of(self, worker: int) -> WorkerLayout:
        """What a worker holds, by its number among all replicas."""
        return self.workers[worker % len(self.workers)]

    def slices(self, rank: int, worker: int) -> Iterator[Slice]:
        """What a trainer rank sends to a worker, in the order of the worker's tensors."""
        for tensor in self.layout_of(worker).tensors:
            for piece in tensor.pieces:
                parameter = self._parameters[piece.parameter]
                owned = self.source.owned(parameter.numel, rank)
                for cut in _cuts(owned, _corners(piece), parameter.num_columns, tensor.spec.num_columns):
                    yield Slice(piece.parameter, tensor.spec.name, *cut)

    def num_bytes(self, rank: int, worker: int) -> int:
        """What a trainer rank sends to a worker."""
        return self.item_bytes * sum(
            count
            * sum(
                length * num_runs for *_, length, num_runs in _cuts(self.source.owned(numel, rank), *geometry)
            )
            for (numel, *geometry), count in self._geometries[worker % len(self.workers)].items()
        )

    @functools.cached_property
    def _parameters(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.source.parameters}

    @functools.cached_property
    def _geometries(self) -> list[Counter]:
        """How often each way of cutting occurs, by tensor-parallel rank."""
        return [
            Counter(
                (
                    self._parameters[piece.parameter].numel,
                    _corners(piece),
                    self._parameters[piece.parameter].num_columns,
                    columns,
                )
                for tensor, columns in ((tensor, tensor.spec.num_columns) for tensor in layout.tensors)
                for piece in tensor.pieces
            )
            for layout in self.workers
        ]

    # ---- who meets whom when ----

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """The (rank, worker) pairs of each round: everybody is in one pair at most, and every pair comes
        once.

        Ranks and workers sit around a table, a worker beside the ranks that hold its rows; in round k a
        rank meets the worker k seats on. The long links so fall into the same rounds, and no order of
        waiting is circular.
        """
        num_seats = max(self.num_workers, self.source.world_size)
        tp_size = len(self.workers)
        seats = {
            worker % tp_size * (num_seats // tp_size) + worker // tp_size: worker
            for worker in range(self.num_workers)
        }
        for k in range(num_seats):
            meetings = ((rank, seats.get((rank + k) % num_seats)) for rank in range(self.source.world_size))
            yield [(rank, worker) for rank, worker in meetings if worker is not None]

    def workers_of(self, rank: int) -> list[int]:
        """The order in which a rank serves the workers."""
        return [worker for meetings in self.rounds() for number, worker in meetings if number == rank]

    def ranks_of(self, worker: int) -> list[int]:
        """The order in which a worker is served."""
        return [rank for meetings in self.rounds() for rank, number in meetings if number == worker]


def make_plan(source: ShardLayout, workers: Sequence[WorkerLayout], *, num_replicas: int) -> ReshardPlan:
    """Raises ReshardError when a worker's tensor needs what the trainer does not have, in that shape and
    type, and when the trainer has a parameter that no worker takes."""
    parameters = {spec.name: spec for spec in source.parameters}
    needed = {piece.parameter for worker in workers for tensor in worker.tensors for piece in tensor.pieces}
    problems = [
        f"{name}: the trainer has it, no worker takes it" for name in parameters if name not in needed
    ]
    dtypes = {spec.dtype for spec in source.parameters} | {
        tensor.spec.dtype for worker in workers for tensor in worker.tensors
    }
    if len(dtypes) != 1 or not dtypes <= ITEM_BYTES.keys():
        problems.append(
            f"types {', '.join(sorted(dtypes))}, expected one of {', '.join(ITEM_BYTES)} for all tensors"
        )
    for worker in workers:
        for tensor in worker.tensors:
            problems += filter(None, (_missing(piece, parameters) for piece in tensor.pieces))
    if problems:
        raise ReshardError(
            f"trainer and workers do not fit in {len(problems)} places: {'; '.join(problems[:3])}. "
            "Build both from one model directory"
        )
    return ReshardPlan(source=source, workers=tuple(workers), num_replicas=num_replicas)


def _missing(piece: Rectangle, parameters: dict[str, TensorSpec]) -> str | None:
    spec = parameters.get(piece.parameter)
    if spec is None:
        return f"{piece.parameter}: a worker needs it, the trainer does not have it"
    if piece.rows[1] > spec.shape[0] or piece.columns[1] > spec.num_columns:
        return (
            f"{piece.parameter}: found shape {list(spec.shape)}, a worker needs rows {piece.rows} and columns"
            f" {piece.columns}"
        )
    return None


def _corners(piece: Rectangle) -> tuple[int, int, int, int, int, int]:
    return (*piece.rows, *piece.columns, piece.at_row, piece.at_column)


Cut = tuple[int, int, int, int, int, int]  # a Slice without its names


@functools.lru_cache(maxsize=1 << 16)  # all layers are cut alike
def _cuts(
    owned: tuple[int, int], corners: tuple[int, ...], source_columns: int, target_columns: int
) -> tuple[Cut, ...]:
    """The part of a rectangle that lies in the flat elements [start, stop): whole rows, and part of a row
    at either end."""
    start, stop = owned
    top, bottom, left, right, at_row, at_column = corners
    if start == stop or top == bottom or left == right:
        return ()
    # Owned elements are a run of the row-major matrix: part of a first row, whole rows, part of a last row.
    first, last = max(top, start // source_columns), min(bottom - 1, (stop - 1) // source_columns)
    if first > last:
        return ()
    # columns of the rectangle that the run has in its first row (from low on) and in its last (up to high)
    low, high = max(start - first * source_columns, left), min(stop - last * source_columns, right)
    if first == last:
        blocks = [(first, 1, low, high)]
    else:
        whole_first, whole_last = first + (low > left), last - (high < right)
        blocks = [(whole_first, whole_last - whole_first + 1, left, right)]
        if low > left:
            blocks.insert(0, (first, 1, low, right))
        if high < right:
            blocks.append((last, 1, left, high))
    cuts = []
    for row, num_rows, begin, end in blocks:
        length = end - begin
        if num_rows < 1 or length < 1:
            continue
        # whole rows in both lie in one piece: one copy in the place of one a row
        if length == source_columns == target_columns:
            num_rows, length = 1, length * num_rows
        at = (at_row + row - top) * target_columns + at_column + begin - left
        cuts.append(
            (row * source_columns + begin - start, source_columns, at, target_columns, length, num_rows)
        )
    return tuple(cuts)


def buckets(slices: Iterable[Slice], bucket_numel: int) -> Iterator[list[Slice]]:
    """The slices cut and grouped into buckets of exactly `bucket_numel` elements, but for the last. Bounds
    memory: a bucket is what a rank packs at one time."""
    bucket, room = [], bucket_numel
    for whole in slices:
        pending = [whole]
        while pending:
            front, rest = _split(pending.pop(), room)
            pending += rest
            bucket.append(front)
            room -= front.numel
            if room == 0:
                yield bucket
                bucket, room = [], bucket_numel
    if bucket:
        yield bucket


def outgoing(plan: ReshardPlan, rank: int, bucket_numel: int) -> Iterator[tuple[int, list[Slice]]]:
    """(worker, bucket) in the order in which a rank sends."""
    for worker in plan.workers_of(rank):
        for bucket in buckets(plan.slices(rank, worker), bucket_numel):
            yield worker, bucket


def incoming(plan: ReshardPlan, worker: int, bucket_numel: int) -> Iterator[tuple[int, list[Slice]]]:
    """(rank, bucket) in the order in which a worker receives."""
    for rank in plan.ranks_of(worker):
        for bucket in buckets(plan.slices(rank, worker), bucket_numel):
            yield rank, bucket


def _split(whole: Slice, room: int) -> tuple[Slice, list[Slice]]:
    """At most `room` elements from the front, and what remains, last first: whole runs if one fits, else a
    part of the first."""
    if whole.numel <= room:
        return whole, []
    num_runs = room // whole.run_length
    if num_runs > 0:
        return whole._replace(num_runs=num_runs), [_skip_runs(whole, num_runs)]
    run = whole._replace(num_runs=1)
    rest = run._replace(
        source_offset=run.source_offset + room,
        target_offset=run.target_offset + room,
        run_length=run.run_length - room,
    )
    return run._replace(run_length=room), [_skip_runs(whole, 1), rest] if whole.num_runs > 1 else [rest]


def _skip_runs(whole: Slice, num_runs: int) -> Slice:
    return whole._replace(
        source_offset=whole.source_offset + num_runs * whole.source_stride,
        target_offset=whole.target_offset + num_runs * whole.target_stride,
        num_runs=whole.num_runs - num_runs,
    )
