"""What an update reports: sums over rows, added over microbatches and ranks, turned into scalars once a
step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_sd.algorithm.policy_loss import PolicyRows
from megatron_sd.ops.head.types import RowValues
from megatron_sd.records import UpdateResult

_POLICY = ("policy_loss", "kl_loss", "clipped", "logprob_gap", "entropy", "rows")
_DISTILL = (
    "jsd_loss",
    "jsd",
    "student_entropy",
    "teacher_entropy",
    "truncated_mass",
    "below_zero",
    "query_rows",
)
SUM_NAMES = _POLICY + _DISTILL
_ROUNDING_NATS = 1e-6  # of a divergence of rows that are all but equal


def policy_sums(rows: PolicyRows, values: RowValues, row_weights: Tensor, *, counted: bool) -> Tensor:
    """The vector of SUM_NAMES with the policy's part filled. row_weights: [R], over the global total.
    counted: False in a pass whose rows another pass of the same step counts."""
    columns = (
        (row_weights * rows.losses).sum(),
        (row_weights * rows.kl).sum(),
        rows.clipped.sum(),
        rows.logprob_gap.sum(),
        values.entropies.sum(),
        torch.ones_like(row_weights).sum(),
    )
    return pad(torch.stack(columns).detach() * float(counted), (0, len(_DISTILL)))


def distill_sums(values: RowValues, query_rows: Tensor, mean_weights: Tensor, *, counted: Tensor) -> Tensor:
    """The vector of SUM_NAMES with the distillation's part filled. mean_weights: [Q], such that the
    weighted sum of divergences over all ranks is L_SD. counted: [Q] bool, the rows that this pass distils."""
    divergences = values.divergences.detach()
    columns = (
        mean_weights * divergences,
        divergences,
        values.entropies[query_rows],
        values.teacher_entropies,
        values.truncated_masses,
        (divergences < -_ROUNDING_NATS).to(divergences.dtype),
        torch.ones_like(divergences),
    )
    return pad((torch.stack(columns) * counted).sum(-1), (len(_POLICY), 0))


def mean_of(updates: Sequence[UpdateResult]) -> UpdateResult:
    """One result for a step's optimiser steps: the last learning rate, the mean of all else over those that
    have it."""
    if len(updates) == 1:
        return updates[0]
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    found = {name: [update.metrics[name] for update in updates if name in update.metrics] for name in names}
    return UpdateResult(
        grad_norm=statistics.fmean(update.grad_norm for update in updates),
        learning_rate=updates[-1].learning_rate,
        metrics={name: statistics.fmean(values) for name, values in found.items()},
    )


def to_metrics(sums: Sequence[float]) -> Mapping[str, float]:
    """Scalars by TensorBoard name from the vector summed over the step. Without query rows there is no
    distill/ scalar; without a pass that has the policy's term, none of the policy's."""
    total = dict(zip(SUM_NAMES, sums, strict=True))
    metrics = {}
    if rows := total["rows"]:
        metrics |= {
            "loss/policy": total["policy_loss"],
            "loss/kl": total["kl_loss"],
            "loss/clipped_share": total["clipped"] / rows,
            "rollout/logprob_gap_nats": total["logprob_gap"] / rows,
            "rollout/entropy_nats": total["entropy"] / rows,
        }
    if total["query_rows"]:
        queries = total["query_rows"]
        student, teacher = total["student_entropy"] / queries, total["teacher_entropy"] / queries
        metrics |= {
            "loss/distill": total["jsd_loss"],
            "distill/divergence_nats": total["jsd"] / queries,
            "distill/student_entropy_nats": student,
            "distill/teacher_entropy_nats": teacher,
            "distill/entropy_gap_nats": student - teacher,
            "distill/truncated_mass": total["truncated_mass"] / queries,
            "distill/below_zero_share": total["below_zero"] / queries,
        }
    return metrics
