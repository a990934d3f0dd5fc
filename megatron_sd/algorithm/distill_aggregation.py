"""What L_SD is a mean over: the distilled rollouts, or their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from megatron_sd.records import Batch, Totals

# of a rank's batch, as packed, and all query tokens of the optimiser step
DistillAggregation = Callable[[Batch, int], Batch]


def over_rollouts(batch: Batch, _: int) -> Batch:
    """The mean over rollouts of the means over their query tokens (SD-Search), as batches are packed."""
    return batch


def over_tokens(batch: Batch, num_queries: int) -> Batch:
    """The mean over all query tokens of the step (GKD, SDFT, SDPO): every query row weighs 1. Rollouts that are
    not distilled do not count."""
    return Batch(
        microbatches=tuple(replace(m, query_weights=np.ones_like(m.query_weights)) for m in batch),
        totals=Totals(policy_weight=batch.totals.policy_weight, distilled_rollouts=float(num_queries)),
    )


DISTILL_AGGREGATIONS: Mapping[str, DistillAggregation] = {"rollout": over_rollouts, "token": over_tokens}
