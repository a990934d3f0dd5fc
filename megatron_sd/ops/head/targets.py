"""What the student is pulled to: the teacher's distribution, or a control that looks like one and knows
nothing.

A target is a function of the teacher's logits, row by row. The controls keep everything else of the method:
the same rows, the same weights, the same divergence. If they help as much as the teacher does, it was not
the teacher's knowledge that helped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Target = Callable[[Tensor], Tensor]


def teacher_target(teacher_logits: Tensor) -> Tensor:
    """What the teacher says."""
    return teacher_logits


def uniform_target(teacher_logits: Tensor) -> Tensor:
    """Every entry of the vocabulary alike, whatever the teacher says."""
    return torch.zeros_like(teacher_logits)


def shuffled_vocabulary_target(teacher_logits: Tensor) -> Tensor:
    """As sure as the teacher, of other tokens: its entries under one permutation of the vocabulary, the
    same in every run."""
    order = _permutation(teacher_logits.shape[-1]).to(teacher_logits.device)
    return teacher_logits.index_select(-1, order)


TARGETS: dict[str, Target] = {
    "teacher": teacher_target,
    "uniform": uniform_target,
    "shuffled_vocabulary": shuffled_vocabulary_target,
}


def target_logits(teacher: Tensor, student: Tensor, target: str, *, is_difference: bool) -> Tensor:
    """[Q, V] logits, in the student's dtype, that the student's [Q, V] are pulled to. teacher [Q, V]: the
    teacher's logits, or with is_difference what they have more than the student's; may be written over.
    target: one of TARGETS."""
    teacher = teacher.to(student.dtype)
    if is_difference:
        teacher = teacher.add_(student.detach())
    return TARGETS[target](teacher)


@functools.lru_cache(maxsize=8)
def _permutation(size: int) -> Tensor:
    """[size] int64, a function of the size alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))
