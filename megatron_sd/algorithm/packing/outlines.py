"""What packing knows of a sample before its arrays are made. All of a step are planned on every rank; their
arrays are made where they are read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from megatron_sd.records import TrainingSample


class Outline(NamedTuple):
    """Of a sample. Token counts: the student's sequence, its prompt, and for each of the teacher's views its
    continuation and its prompt; each prompt with a number that all with the same prompt share. views: none
    where the sample is not distilled. num_sampled, num_queries: rows of the policy loss, and of L_SD. group:
    of its question, in the step."""

    student: int
    prompt: int
    prompt_number: int
    views: tuple[tuple[int, int, int], ...]
    num_sampled: int
    num_queries: int
    group: int

    @property
    def continuations(self) -> int:
        """Tokens of all the teacher's continuations."""
        return sum(continuation for continuation, _, _ in self.views)

    @property
    def is_distilled(self) -> bool:
        """True when L_SD has a term for this sample."""
        return bool(self.views)


class PromptNumbers:
    """Gives every prompt a number, from 0 in the order in which they come; the same prompt the same one."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, prompt: Hashable) -> int:
        """Its number."""
        return self._numbers.setdefault(prompt, len(self._numbers))


@dataclass(frozen=True, kw_only=True)
class Samples(Sequence[TrainingSample]):
    """A step's samples. outlines: of all of them. make: the arrays of one, by its number; asked of those alone
    that are looked at."""

    outlines: Sequence[Outline]
    make: Callable[[int], TrainingSample]

    @classmethod
    def of(cls, samples: Sequence[TrainingSample]) -> Samples:
        """The same samples with their outlines."""
        if isinstance(samples, Samples):
            return samples
        return cls(outlines=outlines_of(samples), make=samples.__getitem__)

    def __len__(self) -> int:
        return len(self.outlines)

    @overload
    def __getitem__(self, number: int) -> TrainingSample: ...
    @overload
    def __getitem__(self, number: slice) -> list[TrainingSample]: ...
    def __getitem__(self, number: Any) -> Any:
        """One sample, or those of a slice."""
        numbers = range(len(self))[number]
        return list(map(self.make, numbers)) if isinstance(numbers, range) else self.make(numbers)

    def part(self, numbers: Sequence[int]) -> Samples:
        """Those with these numbers, in this order."""
        return Samples(
            outlines=[self.outlines[number] for number in numbers], make=lambda own: self.make(numbers[own])
        )


def outlines_of(samples: Sequence[TrainingSample]) -> list[Outline]:
    """Of samples whose arrays are there."""
    students, teachers = PromptNumbers(), PromptNumbers()
    outlines = []
    for sample in samples:
        views = sample.teacher_views if sample.is_distilled else ()
        outlines.append(
            Outline(
                student=len(sample.ids),
                prompt=sample.prompt_length,
                prompt_number=students(sample.ids[: sample.prompt_length].tobytes()),
                views=tuple(
                    (len(view.continuation), len(view.prompt_ids), teachers(view.prompt_ids))
                    for view in views
                ),
                num_sampled=int(sample.loss_mask.sum()),
                num_queries=len(sample.query_positions) if views else 0,
                group=sample.group,
            )
        )
    return outlines
