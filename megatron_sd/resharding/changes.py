"""What changed since the last version, as messages: arithmetic on tensors, nothing travels here.

Elements are compared bit for bit, so a NaN that stays is no change and -0.0 in the place of 0.0 is one. A
message holds the changed elements of one bucket, which is seen in blocks: all values, then how many each
block has, then the place of each in its block:

    the bucket's type [changed] | int16 [blocks], less FULL | int16 or uint8 [changed]

Few changes lie in blocks of 32,768 elements, more in blocks of 256, whichever is shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_sd.resharding.plan import Slice

FULL = 1 << 15
PLACES = {FULL: torch.int16, 1 << 8: torch.uint8}  # by elements of a block: type of a place in one
CHUNK_NUMEL = 1 << 20  # elements that are compared at one time
LARGEST = (1 << 31) - 1  # elements of a shard, and of a bucket, whose places int32 can say
_BITS = {2: torch.int16, 4: torch.int32}  # by bytes of an element

# By parameter: int32, ascending, where a rank's own shard changed; None: in so many places that all count as
# changed, because a message about them would be longer than the elements.
Changes = Mapping[str, Tensor | None]


def message_bytes(num_changed: int, numel: int, item_bytes: int) -> int:
    """Of a message about a bucket of `numel` elements."""
    block = _block(num_changed, numel)
    return num_changed * (item_bytes + PLACES[block].itemsize) + 2 * -(-numel // block)


def _block(num_changed: int, numel: int) -> int:
    """Elements of a block of the shortest message; both sides know it from the header."""
    return min(PLACES, key=lambda block: num_changed * PLACES[block].itemsize + 2 * -(-numel // block))


def least_bytes(bucket: Sequence[Slice], changes: Changes, item_bytes: int) -> int:
    """Of a message about a bucket, from the slices that count as changed as a whole."""
    numel = sum(part.numel for part in bucket)
    return message_bytes(
        sum(part.numel for part in bucket if changes[part.parameter] is None), numel, item_bytes
    )


def take_over(held: Tensor, new: Tensor) -> Tensor | None:
    """Make `held` equal `new`, converted to its type, bit for bit; both flat and of one length. Where it
    changed, as in Changes."""
    bits, num_changed = _BITS[held.element_size()], 0
    found: list[Tensor] = [torch.empty(0, dtype=torch.int32, device=held.device)]
    for start in range(0, len(held), CHUNK_NUMEL):
        old = held[start : start + CHUNK_NUMEL]
        now = new[start : start + CHUNK_NUMEL].to(held)
        found.append(_differing(old.view(bits), now.view(bits)).add_(start))
        old.copy_(now)
        num_changed += len(found[-1])
        too_many = message_bytes(num_changed, len(held), held.element_size()) >= held.nbytes
        if too_many or len(held) > LARGEST:
            held[start:].copy_(new[start:])
            return None
    return torch.cat(found)


def _differing(old: Tensor, new: Tensor) -> Tensor:
    """int32, ascending: where two flat tensors of integers differ."""
    if old.device.type == "cpu":  # twice as fast as torch's
        return torch.from_numpy(np.flatnonzero(old.numpy() != new.numpy()).astype(np.int32))
    return (old != new).nonzero()[:, 0].to(torch.int32)


def changed_in(
    bucket: Sequence[Slice], held: Mapping[str, Tensor], changes: Changes
) -> tuple[Tensor, Tensor]:
    """int32 [changed], ascending: places in the bucket; and their values, of the shards' type."""
    some = held[bucket[0].parameter]
    places, values = [some.new_empty(0, dtype=torch.int32)], [some.new_empty(0)]
    start = 0
    for part in bucket:
        within, source = _changed_in_part(part, changes[part.parameter], some.device)
        places.append(within.to(torch.int32).add_(start))
        values.append(held[part.parameter].index_select(0, source))
        start += part.numel
    return torch.cat(places), torch.cat(values)


def _changed_in_part(part: Slice, changes: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of one slice: places in it, and places in the rank's shard."""
    if changes is None:
        within = torch.arange(part.numel, device=device)
        return within, _spread(within, part, part.source_offset, part.source_stride)
    reach = (part.num_runs - 1) * part.source_stride + part.run_length
    ends = torch.tensor([part.source_offset, part.source_offset + reach], dtype=torch.int32, device=device)
    first, stop = torch.searchsorted(changes, ends).tolist()
    source = changes[first:stop]
    within = source - part.source_offset
    if part.num_runs == 1:
        return within, source
    run = within // part.source_stride
    column = within - run * part.source_stride
    is_inside = column < part.run_length  # a column shard has other columns between its runs
    return (run * part.run_length + column)[is_inside], source[is_inside]


def _spread(within: Tensor, part: Slice, offset: int, stride: int) -> Tensor:
    """From places in a slice, int64, to places in the flat tensor that its runs lie in."""
    if part.num_runs == 1 or part.run_length == stride:
        return within + offset
    return within + (within // part.run_length * (stride - part.run_length) + offset)


def encode(places: Tensor, values: Tensor, numel: int, message: Tensor) -> None:
    """Write the changes of a bucket of `numel` elements into `message`, uint8 of message_bytes."""
    block = _block(len(places), numel)
    moved, counts, within = _parts(message, len(places), numel, values.dtype)
    moved.copy_(values)
    counts.copy_(torch.bincount(places >> block.bit_length() - 1, minlength=len(counts)) - FULL)
    within.copy_(places & block - 1)


def decode(message: Tensor, num_changed: int, numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places in the bucket, int64, ascending; and the values there, as a view of the message."""
    block = _block(num_changed, numel)
    values, counts, within = _parts(message, num_changed, numel, dtype)
    starts = torch.arange(0, numel, block, device=message.device)
    return starts.repeat_interleave(counts.long() + FULL, output_size=num_changed).add_(within), values


def _parts(
    message: Tensor, num_changed: int, numel: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, counts and places of a message, as views."""
    block = _block(num_changed, numel)
    place = PLACES[block]
    sizes = [dtype.itemsize * num_changed, 2 * -(-numel // block), place.itemsize * num_changed]
    values, counts, within = message.split(sizes)
    return values.view(dtype), counts.view(torch.int16), within.view(place)


def apply(bucket: Sequence[Slice], places: Tensor, values: Tensor, staged: Mapping[str, Tensor]) -> None:
    """Write the changed elements of a bucket where they belong in a worker's flat tensors."""
    starts = torch.tensor([0, *(part.numel for part in bucket)], device=places.device).cumsum(0)
    edges = torch.searchsorted(places, starts).tolist()
    begins = starts.tolist()
    for n, part in enumerate(bucket):
        own = slice(edges[n], edges[n + 1])
        if own.start == own.stop:
            continue
        target = _spread(places[own] - begins[n], part, part.target_offset, part.target_stride)
        tensor = staged[part.tensor]
        tensor.index_copy_(0, target.to(tensor.device), values[own].to(tensor.device))
