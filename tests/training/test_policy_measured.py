"""The policy's loss on what is held out: measured between steps, and nothing is left behind."""

import numpy as np
import pytest

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.distributed.world import join_world
from megatron_sd.training import deepspeed_config
from tests.rank_programs.update_steps import full_parameters
from tests.training.fakes import make_config, make_policy, make_samples, write_model

WEIGHTS = TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0)
LORA = {"lora": {"rank": 2}}


def a_policy(path, world, stage, model):
    config = make_config(
        path, update={"zero_stage": stage}, model=model, distill={"block": "none", "measure_every": 0}
    )
    return make_policy(config, world)


def loss_by_hand(policy, batch):
    """The clipped loss from what policy.read says of the rows; the teacher's rows are read beside it."""
    total = 0.0
    for m in batch:
        reading = policy.read(m, batch.totals, with_teacher=True)
        assert len(reading.logprobs) == len(reading.entropies) == len(m.targets)
        assert len(reading.teacher_logprobs) == len(m.query_rows) and (reading.entropies > 0).all()
        ratio = np.exp(reading.logprobs.astype(np.float64) - m.old_logprobs)
        total -= (m.row_weights * np.minimum(ratio * m.advantages, ratio.clip(0.8, 1.2) * m.advantages)).sum()
    return total / batch.totals.policy_weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "model"), [(3, {}), (3, LORA), (2, {}), (0, {}), (3, {"gradient_checkpointing": True})]
)
def test_a_measurement_is_the_loss_of_a_step_and_changes_nothing(tmp_path, monkeypatch, stage, model):
    """No parameter stays gathered between steps here, or from a layer's forward to its backward, and few are
    gathered ahead, as in a model of real size."""
    zero = deepspeed_config._zero
    far = {
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 2000,
    }
    monkeypatch.setattr(
        deepspeed_config, "_zero", lambda stage, *others: zero(stage, *others) | (far if stage == 3 else {})
    )
    world, path = join_world(), write_model(tmp_path / "model")
    (batch,) = pack(make_samples(12), max_tokens=60, world_size=1, aggregation="token")
    assert len(batch.microbatches) > 2
    outcomes = []
    for measures in (False, True):
        policy, losses = a_policy(path, world, stage, dict(model)), []
        for _ in range(3):
            losses += [policy.loss_of(batch), loss_by_hand(policy, batch)] if measures else []
            for microbatch in batch:
                policy.accumulate(microbatch, batch.totals, WEIGHTS)
            outcomes.append((policy.step().metrics["loss/policy"], losses[-2:]))
        if measures:
            policy.loss_of(batch)
        outcomes.append(full_parameters(policy))
    steps, parameters = (
        [o for o in outcomes if isinstance(o, tuple)],
        [o for o in outcomes if not isinstance(o, tuple)],
    )
    for (plain, _), (taken, (measured, read)) in zip(steps[:3], steps[3:], strict=True):
        assert taken == plain
        assert measured == pytest.approx(taken, rel=1e-5)
        assert read == pytest.approx(taken, rel=1e-5)
    for name, expected in parameters[0].items():
        assert (parameters[1][name] == expected).all(), name
