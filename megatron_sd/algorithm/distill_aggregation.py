"""What L_SD is a mean over: the distilled rollouts, or their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_sd.records import Batch, Totals

DistillAggregation = Callable[[Sequence[Batch]], list[Batch]]  # all ranks' batches of a step, as packed


def over_rollouts(batches: Sequence[Batch]) -> list[Batch]:
    """The mean over rollouts of the means over their query tokens (SD-Search), as batches are packed."""
    return list(batches)


def over_tokens(batches: Sequence[Batch]) -> list[Batch]:
    """The mean over all query tokens of the step (GKD, SDFT, SDPO): every query row weighs 1. Rollouts that are
    not distilled do not count."""
    num_tokens = sum(len(microbatch.query_rows) for batch in batches for microbatch in batch)
    return [
        Batch(
            microbatches=tuple(replace(m, query_weights=np.ones_like(m.query_weights)) for m in batch),
            totals=Totals(policy_weight=batch.totals.policy_weight, distilled_rollouts=float(num_tokens)),
        )
        for batch in batches
    ]


DISTILL_AGGREGATIONS: Mapping[str, DistillAggregation] = {"rollout": over_rollouts, "token": over_tokens}
