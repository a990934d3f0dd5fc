"""What L_SD is a mean over."""

import dataclasses

import numpy as np
import pytest

from megatron_sd.algorithm.assemble import own_batches
from megatron_sd.algorithm.distill_aggregation import DISTILL_AGGREGATIONS
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.config import UpdateConfig
from tests.training.fakes import make_samples


def with_queries(sample, count):
    """The sample with so many sampled tokens, all of them distilled."""
    length = sample.prompt_length + count
    mask = np.arange(length) >= sample.prompt_length
    return dataclasses.replace(
        sample,
        ids=np.resize(sample.ids, length),
        loss_mask=mask,
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        advantages=np.zeros(length, dtype=np.float32),
        query_positions=np.flatnonzero(mask),
        teacher_prompt_ids=(1, 2),
    )


@pytest.mark.parametrize(("name", "expected"), [("rollout", 0.5), ("token", 0.2)])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_short_rollout_counts_as_a_rollout_or_as_its_tokens(name, expected, num_ranks):
    """Lengths 2 and 8, divergences 1 and 0, and a third rollout that is not distilled: (1 + 0) / 2, or 2 / 10."""
    first, second, third = make_samples(3)
    samples = [
        with_queries(first, 2),
        with_queries(second, 8),
        dataclasses.replace(third, teacher_prompt_ids=None),
    ]
    packed = pack(samples, max_tokens=1, world_size=num_ranks, aggregation="token")
    batches = [DISTILL_AGGREGATIONS[name](batch, 10) for batch in packed]
    assert len(batches) == num_ranks
    total = 0.0
    for batch in batches:
        assert batch.totals == batches[0].totals
        assert batch.totals.policy_weight == packed[0].totals.policy_weight
        for m in batch:
            of_first = len(m.query_rows) == 2
            total += float(m.query_weights.sum()) * of_first / batch.totals.distilled_rollouts
    assert total == pytest.approx(expected, abs=1e-6)


def test_a_step_without_a_query_is_none():
    samples = [dataclasses.replace(s, teacher_prompt_ids=None) for s in make_samples(4)]
    for name in DISTILL_AGGREGATIONS:
        (batch,) = own_batches(
            samples, config=UpdateConfig(), aggregation="token", distill_aggregation=name, place=(0, 1)
        )
        assert batch.totals.distilled_rollouts == 0.0
