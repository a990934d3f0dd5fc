"""Boxes for buckets that carry what changed since the version that the workers hold.

Before each bucket goes a header, int64 [1]: how many elements of it changed, or DENSE: all of it follows. A
bucket without a change is its header alone.

What a rank compares with lives in its outbox, and what a worker changes in the memory beside its inbox. Both
end with the session, as every transfer that failed does, so the first transfer of a session is dense and each
further one follows one that every worker has taken.
"""

from __future__ import annotations

import functools
from collections import deque

import torch
from torch import Tensor

from megatron_sd.errors import ReshardError
from megatron_sd.resharding.changes import (
    Changes,
    apply,
    changed_in,
    decode,
    encode,
    least_bytes,
    message_bytes,
    take_over,
)
from megatron_sd.resharding.exchange import (
    NUM_BUFFERS,
    BucketInbox,
    BucketOutbox,
    Tensors,
    packed_runs,
    source_runs,
    synchronize,
)
from megatron_sd.resharding.plan import Slice
from megatron_sd.resharding.transport import Pending

DENSE = -1
HEADER_BYTES = 8


class ChangesOutbox(BucketOutbox):
    """Keeps a copy of this rank's shards, in the wire's type, as the workers hold them, and sends of each
    bucket the elements that differ from it, or all where that is shorter.

    num_changed: elements of the rank's shards that the last `send` found changed, at least; None after the
    first one.
    """

    @functools.cached_property
    def _held(self) -> dict[str, Tensor]:
        """The copy, by parameter; empty until the first transfer."""
        return {}

    def send(self, shards: Tensors) -> int:
        """Bucket by bucket, worker by worker, from the copy: each parameter is copied when its first bucket
        is packed, so that one bucket is compared while another travels."""
        compares, num_bytes = bool(self._held), 0
        changes: dict[str, Tensor | None] = {}
        travelling: deque[list[Pending]] = deque()
        for worker, bucket in self._buckets:
            if len(travelling) == NUM_BUFFERS:
                _wait(travelling.popleft())
            for name in {part.parameter for part in bucket} - changes.keys():
                changes[name] = self._taken_over(name, shards[name])
            count, body = self._packed(bucket, changes)
            header = torch.tensor([count], device=body.device)
            messages = [message.view(torch.uint8) for message in (header, body) if len(message)]
            travelling.append([self._wire.send(message, self._first_worker + worker) for message in messages])
            num_bytes += sum(map(len, messages))
        for pending in travelling:
            _wait(pending)
        synchronize(self._device)
        if compares:
            counts = (len(self._held[name]) if own is None else len(own) for name, own in changes.items())
            self.num_changed = sum(counts)
        return num_bytes

    def _taken_over(self, name: str, new: Tensor) -> Tensor | None:
        """Copy a parameter's shard; what changed in it, or None for all when there was no copy."""
        if name in self._held:
            return take_over(self._held[name], new)
        self._held[name] = self._buffers.like(len(new)).copy_(new)
        return None

    def _packed(self, bucket: list[Slice], changes: Changes) -> tuple[int, Tensor]:
        """The header's number, and what follows it."""
        buffer = self._buffers.take(bucket)
        item_bytes = buffer.element_size()
        if least_bytes(bucket, changes, item_bytes) < buffer.nbytes:
            places, values = changed_in(bucket, self._held, changes)
            size = message_bytes(len(places), len(buffer), item_bytes)
            if not len(places):
                return 0, buffer[:0]
            if size < buffer.nbytes:
                message = buffer.view(torch.uint8)[:size]
                encode(places, values, len(buffer), message)
                return len(places), message
        for part, packed in packed_runs(bucket, buffer):
            packed.copy_(source_runs(self._held, part))
        return DENSE, buffer

    def close(self) -> None:
        """Hang up, and forget what the workers held."""
        super().close()
        self._held.clear()


class ChangesInbox(BucketInbox):
    """Receives what ChangesOutbox sends into staged tensors, which still hold the version before; one bucket
    is unpacked while the next one travels."""

    _holds_version = False

    def receive(self) -> int:
        """Rank by rank, in the plan's order. Raises ReshardError for changes of a version that this worker
        does not have."""
        num_bytes = 0
        arriving: deque[tuple[list[Slice], int, Tensor, Pending | None]] = deque()
        for rank, bucket in self._buckets:
            count, body = self._header(rank, bucket)
            pending = self._wire.receive(body.view(torch.uint8), rank) if len(body) else None
            num_bytes += HEADER_BYTES + body.nbytes
            arriving.append((bucket, count, body, pending))
            if len(arriving) == NUM_BUFFERS:
                self._take(*arriving.popleft())
        while arriving:
            self._take(*arriving.popleft())
        synchronize(next(iter(self._staged.values())).device)
        self._holds_version = True
        return num_bytes

    def _header(self, rank: int, bucket: list[Slice]) -> tuple[int, Tensor]:
        """A header's number, once it is here, and the memory for what follows it."""
        buffer = self._buffers.take(bucket)
        header = torch.empty(1, dtype=torch.int64, device=buffer.device)
        self._wire.receive(header.view(torch.uint8), rank).wait()
        count = int(header.item())
        if count == DENSE:
            return count, buffer
        if not self._holds_version:
            raise ReshardError(
                f"trainer rank {rank} sent {count} changed elements in the first transfer of a session,"
                " expected all: publish again"
            )
        size = message_bytes(count, len(buffer), buffer.element_size()) if count else 0
        return count, buffer.view(torch.uint8)[:size]

    def _take(self, bucket: list[Slice], count: int, body: Tensor, pending: Pending | None) -> None:
        if pending is None:
            return
        if count == DENSE:
            self._unpack(bucket, body, pending)
            return
        pending.wait()
        numel = sum(part.numel for part in bucket)
        apply(bucket, *decode(body, count, numel, self._buffers.dtype), self._staged)


def _wait(pending: list[Pending]) -> None:
    for message in pending:
        message.wait()
