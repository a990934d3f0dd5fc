"""Moving what a plan says: written by the senders straight into a worker's memory, or packed into buckets
and sent.

Outboxes belong to trainer ranks, inboxes to workers; both follow the same plan in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from megatron_sd.resharding.plan import ReshardPlan, Slice, buckets, incoming, outgoing
from megatron_sd.resharding.transport import Pending, Wire

Tensors = Mapping[str, Tensor]  # flat
NUM_BUFFERS = 2  # one is packed or unpacked while the other travels
CHECKSUM_NUMEL = 1 << 18  # elements that are copied at one time to be summed up


class Outbox(Protocol):
    """A trainer rank's side. num_changed: elements of the rank's shards that the last `send` found changed;
    None where it did not compare."""

    num_changed: int | None

    def send(self, shards: Tensors) -> int:
        """Send this rank's shards (flat, valid elements only, by parameter; another type is converted on
        the way). Returns the bytes sent when the buffers are free again. Raises ReshardError naming the
        worker that failed."""
        ...

    def close(self) -> None:
        """Let go of connections and memory."""
        ...


class Inbox(Protocol):
    """A worker's side."""

    def receive(self) -> int:
        """Until everything is in the staged tensors, or, where the senders write there themselves, at
        once. Returns the bytes that came, or come."""
        ...

    def close(self) -> None:
        """Let go of connections and memory."""
        ...


def runs(tensor: Tensor, offset: int, stride: int, part: Slice) -> Tensor:
    """[num_runs, run_length] view of a slice's elements in a flat tensor."""
    return tensor.as_strided((part.num_runs, part.run_length), (stride, 1), tensor.storage_offset() + offset)


def source_runs(shards: Tensors, part: Slice) -> Tensor:
    """Where a slice lies in the rank's shards."""
    return runs(shards[part.parameter], part.source_offset, part.source_stride, part)


def target_runs(staged: Tensors, part: Slice) -> Tensor:
    """Where a slice lies in the worker's tensors."""
    return runs(staged[part.tensor], part.target_offset, part.target_stride, part)


class DirectOutbox:
    """Writes every slice where it belongs, in one copy; between devices a copy may pass through as much as
    a bucket.

    windows: the workers' staged tensors, by worker.
    """

    num_changed: int | None = None

    def __init__(
        self,
        plan: ReshardPlan,
        rank: int,
        windows: Mapping[int, Tensors],
        *,
        bucket_numel: int,
        device: torch.device,
    ):
        self._parts = [
            (worker, part) for worker, bucket in outgoing(plan, rank, bucket_numel) for part in bucket
        ]
        self._windows = dict(windows)
        self._item_bytes = plan.item_bytes
        self._device = device

    def send(self, shards: Tensors) -> int:
        """All slices, worker by worker."""
        numel = 0
        for worker, part in self._parts:
            target_runs(self._windows[worker], part).copy_(source_runs(shards, part))
            numel += part.numel
        synchronize(self._device)
        return numel * self._item_bytes

    def close(self) -> None:
        """Unmap the windows."""
        self._windows.clear()


class DirectInbox:
    """Its tensors fill by themselves. num_bytes: of all of them, without padding."""

    def __init__(self, num_bytes: int):
        self._num_bytes = num_bytes

    def receive(self) -> int:
        """Nothing to do here: the senders say when they have written."""
        return self._num_bytes

    def close(self) -> None:
        """Nothing to let go of."""


class BucketBuffers:
    """NUM_BUFFERS buckets in turn."""

    def __init__(self, bucket_numel: int, dtype: torch.dtype, device: torch.device):
        self._buffers = [torch.empty(bucket_numel, dtype=dtype, device=device) for _ in range(NUM_BUFFERS)]
        self._next = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of their elements."""
        return self._buffers[0].dtype

    def like(self, numel: int) -> Tensor:
        """Further memory of their type, where they are: flat, not initialised."""
        return self._buffers[0].new_empty(numel)

    def take(self, bucket: Sequence[Slice]) -> Tensor:
        """The next buffer, cut to the bucket."""
        self._next = (self._next + 1) % NUM_BUFFERS
        return self._buffers[self._next][: sum(part.numel for part in bucket)]


class BucketOutbox:
    """Packs slices into buckets of at most `bucket_numel` elements and sends them, packing one while
    another travels."""

    num_changed: int | None = None

    def __init__(
        self,
        plan: ReshardPlan,
        rank: int,
        wire: Wire,
        buffers: BucketBuffers,
        *,
        bucket_numel: int,
        device: torch.device,
    ):
        self._buckets = list(outgoing(plan, rank, bucket_numel))
        self._first_worker = plan.source.world_size  # among the wire's parties
        self._wire = wire
        self._buffers = buffers
        self._item_bytes = plan.item_bytes
        self._device = device

    def send(self, shards: Tensors) -> int:
        """Bucket by bucket, worker by worker."""
        numel = 0
        travelling: deque[Any] = deque()
        for worker, bucket in self._buckets:
            if len(travelling) == NUM_BUFFERS:
                travelling.popleft().wait()
            buffer = self._buffers.take(bucket)
            for part, packed in packed_runs(bucket, buffer):
                packed.copy_(source_runs(shards, part))
            travelling.append(self._wire.send(_bytes(buffer), self._first_worker + worker))
            numel += len(buffer)
        for pending in travelling:
            pending.wait()
        synchronize(self._device)
        return numel * self._item_bytes

    def close(self) -> None:
        """Hang up."""
        self._wire.close()


class BucketInbox:
    """Receives what BucketOutbox sends and unpacks it into the staged tensors, one bucket while the next
    one travels."""

    def __init__(
        self,
        plan: ReshardPlan,
        worker: int,
        wire: Wire,
        buffers: BucketBuffers,
        *,
        bucket_numel: int,
        staged: Tensors,
    ):
        self._buckets = list(incoming(plan, worker, bucket_numel))
        self._wire = wire
        self._buffers = buffers
        self._staged = staged

    def receive(self) -> int:
        """Rank by rank, in the plan's order."""
        num_bytes = 0
        travelling: deque[tuple[list[Slice], Tensor, Pending]] = deque()
        for rank, bucket in self._buckets:
            buffer = self._buffers.take(bucket)
            travelling.append((bucket, buffer, self._wire.receive(_bytes(buffer), rank)))
            num_bytes += buffer.nbytes
            if len(travelling) == NUM_BUFFERS:
                self._unpack(*travelling.popleft())
        while travelling:
            self._unpack(*travelling.popleft())
        synchronize(next(iter(self._staged.values())).device)
        return num_bytes

    def _unpack(self, bucket: list[Slice], buffer: Tensor, pending: Pending) -> None:
        pending.wait()
        for part, packed in packed_runs(bucket, buffer):
            target_runs(self._staged, part).copy_(packed)

    def close(self) -> None:
        """Hang up."""
        self._wire.close()


def packed_runs(bucket: Sequence[Slice], buffer: Tensor) -> Iterator[tuple[Slice, Tensor]]:
    """Each slice and its [num_runs, run_length] place in the bucket's buffer."""
    start = 0
    for part in bucket:
        yield part, buffer[start : start + part.numel].view(part.num_runs, part.run_length)
        start += part.numel


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)


def synchronize(device: torch.device) -> None:
    """Wait for what was enqueued on a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sent_checksums(plan: ReshardPlan, rank: int, shards: Tensors) -> dict[str, dict[str, str]]:
    """By worker number and parameter: xxh3 of the bytes that this rank sends. Reads everything once more."""
    dtype = getattr(torch, plan.dtype)
    return {
        str(worker): _checksums(
            (part.parameter, source_runs(shards, part).to(dtype))
            for bucket in buckets(plan.slices(rank, worker), CHECKSUM_NUMEL)
            for part in bucket
        )
        for worker in plan.workers_of(rank)
    }


def staged_checksums(plan: ReshardPlan, rank: int, worker: int, staged: Tensors) -> dict[str, str]:
    """By parameter: xxh3 of the bytes that lie where `rank` had to put them."""
    parts = (part for bucket in buckets(plan.slices(rank, worker), CHECKSUM_NUMEL) for part in bucket)
    return _checksums((part.parameter, target_runs(staged, part)) for part in parts)


def _checksums(parts: Iterator[tuple[str, Tensor]]) -> dict[str, str]:
    sums: dict[str, xxhash.xxh3_64] = {}
    for parameter, elements in parts:
        packed = elements.contiguous().cpu().view(torch.uint8).numpy()
        sums.setdefault(parameter, xxhash.xxh3_64()).update(packed.data)
    return {parameter: digest.hexdigest() for parameter, digest in sums.items()}
