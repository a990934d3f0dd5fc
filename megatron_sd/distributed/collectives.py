"""The few collective operations the project needs outside DeepSpeed. Every rank must call them in the same
order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sd.distributed.world import World
from megatron_sd.durable.run_lock import hold
from megatron_sd.errors import MegatronSdError, StopRequested

Item = TypeVar("Item")
Result = TypeVar("Result")


def sum_floats(world: World, values: Sequence[float]) -> list[float]:
    """Elementwise sum over ranks, in float64."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    with world.pulse.waiting():
        dist.all_reduce(total)
        return total.tolist()


def share(world: World, items: Sequence[Item]) -> Sequence[Item]:
    """This rank's contiguous part of the items: all parts in rank order are the whole, and sizes differ by
    one at most."""
    start, stop = (len(items) * rank // world.size for rank in (world.rank, world.rank + 1))
    return items[start:stop]


def gather_objects(world: World, value: Any) -> list[Any]:
    """The picklable values of all ranks, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    with world.pulse.waiting():
        dist.all_gather_object(values, value)
    return values


def together(world: World, action: Callable[[], Item]) -> list[Item]:
    """The action's values from all ranks, in rank order. An error of ours on one rank is raised on every
    rank: none is left waiting for a rank that has given up."""
    results = gather_objects(world, _tried(world, action))
    _raise_first(failed for _, failed in results)
    return [value for value, _ in results]


def each(world: World, action: Callable[[], Item]) -> Item:
    """This rank's value of an action that every rank takes; an error of ours on one rank is raised on every
    rank."""
    value, failure = _tried(world, action)
    _raise_first(gather_objects(world, failure))
    return value


def _tried(world: World, action: Callable[[], Any]) -> tuple[Any, MegatronSdError | None]:
    """Its value, or the error to raise on every rank."""
    try:
        return action(), None
    except MegatronSdError as error:
        if world.size == 1:
            raise
        return None, type(error)(f"rank {world.rank}: {error}")


def _raise_first(failures: Iterable[MegatronSdError | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure


def shared_out(
    world: World, items: Sequence[Item], action: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """Every rank acts on its share of the items; every rank gets all results, in the items' order, or the
    error of one rank."""
    mine = share(world, items)
    return [result for part in together(world, lambda: action(mine)) for result in part]


@contextmanager
def hold_together(world: World, directory: Path) -> Iterator[None]:
    """The first rank holds the directory for all (run_lock.hold). Raises ConfigError on every rank when
    another process does."""
    with ExitStack() as held:
        together(world, lambda: held.enter_context(hold(directory)) if world.is_first else None)
        yield


def check_stop(world: World) -> None:
    """Raise StopRequested when this rank has been asked to stop; the others learn of it by `together`."""
    if world.stop.reason is not None:
        raise StopRequested(f"{world.stop.reason}, in phase {world.pulse.phase}")


def agree_to_stop(world: World, *, now: bool = True) -> None:
    """Raise StopRequested on every rank when any rank has been asked to stop. now: the same on every rank;
    False: something is half done, and nobody stops before its end."""
    if now and sum_floats(world, [float(world.stop.reason is not None)])[0]:
        reason = next(reason for reason in gather_objects(world, world.stop.reason) if reason is not None)
        raise StopRequested(f"{reason}, in phase {world.pulse.phase}")


def broadcast_object(world: World, value: Any, source: int = 0) -> Any:
    """The picklable value of rank `source`, on every rank."""
    if world.size == 1:
        return value
    holder = [value]
    with world.pulse.waiting():
        dist.broadcast_object_list(holder, src=source)
    return holder[0]


def gather_tensors(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """[ranks, ...]: the tensors of all ranks of the group (None: of the world), in rank order; they have
    one shape and dtype."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.stack(parts)
