"""Which samples are read together: bins equal in number on every rank, balanced in cost, with little padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from megatron_sd.algorithm.packing.outlines import Outline
from megatron_sd.records import Layout

Bin = list[int]  # indices of the samples of one microbatch


class Tally(ABC):
    """Positions of a microbatch as it fills. goes_by_prompt: they are fewest with samples of one prompt
    together, not with those of one length."""

    goes_by_prompt = False

    @abstractmethod
    def add(self, outline: Outline) -> int:
        """The cost with this sample in it."""


class _PaddedTally(Tally):
    """Every block of sequences is as wide as its longest."""

    def __init__(self) -> None:
        self._students = self._continuations = self._widest = self._widest_continuation = (
            self._widest_prompt
        ) = 0
        self._prompts: set[int] = set()

    def add(self, outline: Outline) -> int:
        self._students += 1
        self._widest = max(self._widest, outline.student)
        for continuation, prompt, prompt_number in outline.views:
            self._continuations += 1
            self._prompts.add(prompt_number)
            self._widest_continuation = max(self._widest_continuation, continuation)
            self._widest_prompt = max(self._widest_prompt, prompt)
        return (
            self._students * self._widest
            + self._continuations * self._widest_continuation
            + len(self._prompts) * self._widest_prompt
        )


class _PackedTally(Tally):
    """The same without padding, where each of the teacher's continuations has its own copy of its prompt."""

    def __init__(self) -> None:
        self._tokens = 0

    def add(self, outline: Outline) -> int:
        self._tokens += outline.student + sum(
            continuation + prompt - 1 for continuation, prompt, _ in outline.views
        )
        return self._tokens


class _SharedTally(Tally):
    """Without padding, and every prompt once."""

    goes_by_prompt = True

    def __init__(self) -> None:
        self._tokens = 0
        self._prompts: set[tuple[str, int]] = set()

    def add(self, outline: Outline) -> int:
        self._tokens += outline.student - outline.prompt + outline.continuations
        self._read("student", outline.prompt_number, outline.prompt)
        for _, prompt, number in outline.views:
            self._read("teacher", number, prompt - 1)
        return self._tokens

    def _read(self, reader: str, number: int, tokens: int) -> None:
        if (reader, number) not in self._prompts:
            self._prompts.add((reader, number))
            self._tokens += tokens


TALLIES: dict[Layout, type[Tally]] = {
    "padded": _PaddedTally,
    "packed": _PackedTally,
    "shared": _SharedTally,
}


def bin_cost(outlines: Sequence[Outline], indices: Bin, *, tally: type[Tally] = _PaddedTally) -> int:
    """Positions of the microbatch: student and teacher, padding included where there is some."""
    counted = tally()
    return max((counted.add(outlines[i]) for i in indices), default=0)


def plan_bins(
    outlines: Sequence[Outline],
    max_tokens: int,
    world_size: int,
    *,
    tally: type[Tally] = _PaddedTally,
) -> list[Bin]:
    """Bins of sample indices; their number is a positive multiple of world_size (empty bins fill up)."""
    order = sorted(
        range(len(outlines)),
        key=lambda i: (
            (outlines[i].prompt_number, i)
            if tally.goes_by_prompt
            else (-outlines[i].student, -outlines[i].continuations, i)
        ),
    )
    num_bins = max(len(_fill(outlines, order, max_tokens, tally)), 1)
    # Every rank takes as many: a collective runs in each microbatch. Bins that this adds may as well be
    # used, so the capacity is searched for once more: the smallest that needs no more than num_bins.
    num_bins = -(-num_bins // world_size) * world_size
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if len(_fill(outlines, order, middle, tally)) <= num_bins else (middle + 1, high)
        )
    bins = _fill(outlines, order, low, tally)
    return bins + [[] for _ in range(num_bins - len(bins))]


def _fill(outlines: Sequence[Outline], order: Sequence[int], capacity: int, tally: type[Tally]) -> list[Bin]:
    """Cut the order into runs as long as the capacity allows; a sample above the capacity is a run of its
    own."""
    bins: list[Bin] = []
    counted = tally()
    for index in order:
        if bins and counted.add(outlines[index]) <= capacity:
            bins[-1].append(index)
            continue
        counted = tally()
        counted.add(outlines[index])
        bins.append([index])
    return bins


def assign_bins(bins: Sequence[Bin], costs: Sequence[int], world_size: int) -> list[list[Bin]]:
    """Deal the bins, costliest first, in rounds of one per rank; within a round the least loaded rank gets
    the costliest."""
    ranks: list[list[Bin]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    order = sorted(range(len(bins)), key=lambda i: (-costs[i], i))
    for start in range(0, len(order), world_size):
        receivers = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(receivers, order[start : start + world_size], strict=True):
            ranks[rank].append(bins[index])
            loads[rank] += costs[index]
    return ranks
