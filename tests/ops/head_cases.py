"""Rows of logits for the head's visits, and what they give in float64 by autograd."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.jsd_reference import MASKED, divergence_rows
from megatron_sd.ops.native.head_visits import HeadVisits
from tests.ops.divergences import JSD

BF16, FP32 = torch.bfloat16, torch.float32
SKEWED = replace(JSD, beta=0.3, temperature=1.5)
EPS = {FP32: 2e-6, BF16: 4e-3}  # of a gradient as it is stored


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of logits, the teacher's matrix of the query rows, and how much each number counts."""

    logits: torch.Tensor
    teacher: torch.Tensor
    targets: torch.Tensor
    query_rows: torch.Tensor
    is_difference: bool
    temperature: float
    divergence: Divergence | None

    @property
    def teacher_logits(self):
        own = self.logits[self.query_rows].double() if self.is_difference else 0.0
        return own + self.teacher.double()

    def visits(self, **options):
        """On copies: both visits write."""
        return HeadVisits(
            self.logits.clone(),
            self.teacher.clone(),
            self.targets,
            self.query_rows,
            divergence=self.divergence,
            temperature=self.temperature,
            teacher_is_difference=self.is_difference,
            **options,
        )

    def slopes(self):
        """Of logprobs, entropies and divergences (with a top_k of its tokens' logits): of either sign, a zero
        among them."""
        rows, queries = len(self.targets), len(self.query_rows)
        of_divergences = 2.0 - torch.arange(queries)
        if self.divergence is not None and self.divergence.top_k is not None:
            events = self.divergence.top_k + self.divergence.tail_bucket
            of_divergences = of_divergences[:, None] * torch.linspace(-1, 2, events)
        return torch.linspace(-1, 1, rows), torch.linspace(0.3, -0.2, rows), of_divergences


class Found(NamedTuple):
    """What the visits are asked for."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    teacher_logprobs: torch.Tensor
    teacher_entropies: torch.Tensor
    divergences: torch.Tensor
    gradient: torch.Tensor


def make(  # noqa: PLR0913
    *,
    num_rows=7,
    vocabulary=1333,
    query_rows=(0, 3, 6),
    dtype=FP32,
    teacher_dtype=None,
    is_difference=True,
    distance=0.5,
    temperature=0.8,
    divergence=SKEWED,
):
    generator = torch.Generator().manual_seed(5)
    logits = (3.0 * torch.randn(num_rows, vocabulary, generator=generator)).to(dtype)
    query_rows = torch.tensor(query_rows, dtype=torch.long)
    teacher = distance * torch.randn(len(query_rows), vocabulary, generator=generator)
    if not is_difference:
        teacher = teacher + logits[query_rows].float()
    return Case(
        logits=logits,
        teacher=teacher.to(teacher_dtype or dtype),
        targets=torch.randint(0, vocabulary, (num_rows,), generator=generator),
        query_rows=query_rows,
        is_difference=is_difference,
        temperature=temperature,
        divergence=divergence,
    )


def visited(case, **options):
    """Of the native code."""
    visits = case.visits(**options)
    gradient = visits.write_gradient(*case.slopes())
    return Found(*visits.numbers, gradient)


def exact(case, dtype=torch.float64):
    """Of torch, in this dtype."""
    leaf = case.logits.to(dtype).clone().requires_grad_()
    targets, queries = case.targets, case.query_rows

    def numbers(logits, at):
        log_probs = torch.log_softmax(logits.clamp(min=MASKED) / case.temperature, -1)
        return log_probs.gather(-1, at[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)

    own, read = numbers(leaf, targets), numbers(case.teacher_logits.to(dtype), targets[queries])
    divergences = torch.zeros(len(queries), dtype=dtype)
    if case.divergence is not None:
        divergences = divergence_rows(leaf[queries], case.teacher_logits.to(dtype), case.divergence).values
    slopes = [slope.to(dtype) for slope in case.slopes()]
    parts = [(s * n).sum() for s, n in zip(slopes, (*own, divergences), strict=True)]
    sum(parts).backward()
    return Found(*(n.detach() for n in (*own, *read, divergences)), leaf.grad)


def error(found, expected):
    """Relative, of the whole tensor; absolute where nothing is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)).item()
