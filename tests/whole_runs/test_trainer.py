"""The loop itself, over parts that only note what they were asked for; whole runs are in test_training.py."""

import functools
import math
import signal
from types import SimpleNamespace

import pytest
import torch

from megatron_sd import trainer as trainer_module
from megatron_sd.algorithm.distill_loss import POLICY_TERM
from megatron_sd.algorithm.packing.microbatches import build_microbatch
from megatron_sd.config import RolloutConfig, SafetyConfig
from megatron_sd.distributed.collectives import together
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import BarrenStepError, ReshardError, RolloutError, StopRequested
from megatron_sd.observability.progress import SILENT
from megatron_sd.observability.timers import Timers
from megatron_sd.records import Batch, Totals
from megatron_sd.rollout.collecting import Collecting
from megatron_sd.trainer import Schedule, Trainer
from megatron_sd.training.critic.critic import policy_alone
from megatron_sd.training.rereading import reread
from megatron_sd.training.safety.stability import Stability


def trainer(events: list, *, fails_at: tuple[str, int]) -> Trainer:
    """Each step samples nothing and updates nothing; the engine is lost in one phase of one step."""

    def note(phase: str, step: int) -> None:
        events.append((phase, step))
        if (phase, step) == fails_at:
            raise (
                ReshardError("a worker is gone") if phase == "publish" else RolloutError("no server is left")
            )

    def take(step: int, number: int) -> list:
        note("rollout", step)
        return []

    def publish(policy, engine, version) -> None:
        note("publish", version)

    update = SimpleNamespace(metrics={}, grad_norm=0.0, learning_rate=0.0)
    batch = SimpleNamespace(microbatches=[], totals=None, padding_share=0.0, is_first=True)
    checkpoints = SimpleNamespace(
        load=lambda policy: None,
        save=lambda policy, step, state, wait: events.append(("save", step)),
        settle=lambda wait: None,
        refuse_when_resume_is_off=lambda: None,
        plan_changes=(),
    )
    own = Trainer(
        schedule=Schedule(num_steps=3, eval_every=(), transcripts_every=0, checkpoint_every=0),
        world=lone_world(torch.device("cpu")),
        evaluation=None,
        sampling=SimpleNamespace(take=take, settle=lambda: None, state=lambda step: {}),
        collect=Collecting(RolloutConfig()),
        score=lambda groups: groups,
        advantages=lambda groups: [],
        teach=lambda groups, advantages, step, numbers: [],
        to_samples=lambda groups, advantages, prompts: [],
        pack=lambda samples: [batch],
        reread=lambda batches, policy: batches,
        learn=policy_alone,
        alpha=SimpleNamespace(passes=lambda step: (), observe=lambda policy: None, state=dict, metrics=dict),
        policy=SimpleNamespace(step=lambda limit: update),
        publisher=SimpleNamespace(publish=publish),
        engine=None,
        checkpoints=checkpoints,
        recorder=SimpleNamespace(
            begin=lambda step, changes: None, close=lambda: events.append(("close", None))
        ),
        timers=Timers(),
        work=SILENT,
        stability=SimpleNamespace(
            norm_limit=lambda: math.inf, taken=lambda step, norm: None, state=dict, refuse_to_end=lambda: None
        ),
        attempts=SimpleNamespace(begin=lambda step: None),
    )
    own.record = lambda *_: None
    return own


@pytest.mark.parametrize(
    ("fails_at", "error", "step"),
    [(("rollout", 2), RolloutError, 2), (("publish", 2), ReshardError, 2), (("rollout", 0), RolloutError, 0)],
)
def test_what_was_trained_is_saved_when_the_engine_is_lost(fails_at, error, step):
    events: list = []
    with pytest.raises(error):
        trainer(events, fails_at=fails_at).train()
    assert events[-2:] == [fails_at, ("save", step)]


def test_a_run_without_failures_publishes_every_version_and_saves_once():
    events: list = []
    trainer(events, fails_at=("never", 0)).train()
    assert [version for phase, version in events if phase == "publish"] == [0, 1, 2, 3]
    assert [event for event in events if event[0] in ("save", "close")] == [("save", 3), ("close", None)]


def test_no_rank_publishes_before_all_have_stopped_sampling(monkeypatch):
    """Ranks may share a server, whose new weights end what it samples for the others."""
    events: list = []
    own = trainer(events, fails_at=("never", 0))
    own.sampling.settle = lambda: events.append(("settle", own.step))
    monkeypatch.setattr(
        "megatron_sd.trainer.together",
        lambda world, action: (together(world, action), events.append(("meet", own.step)))[0],
    )
    own.train()
    told = [event for event in events if event[0] in ("settle", "meet", "publish")]
    assert told.count(("settle", 2)) == 1
    place = told.index(("settle", 2))
    assert told[place : place + 3] == [("settle", 2), ("meet", 2), ("publish", 2)]


def test_a_step_without_a_sampled_token_is_passed_over_and_counted():
    events: list = []
    own = trainer(events, fails_at=("never", 0))
    own.stability = Stability(SafetyConfig())
    recorded = []
    own.recorder.record = lambda step, metrics: recorded.append((step, metrics))

    def barren_once(groups, advantages, prompts):
        if own.step == 1:
            raise BarrenStepError("none of the step's 8 rollouts has a sampled token")
        return []

    own.to_samples = barren_once
    own.train()
    assert recorded == [(2, {"optim/refused_steps": 1.0})]
    assert [step for name, step in events if name == "rollout"] == [0, 1, 2]
    assert ("publish", 2) in events and events[-2:] == [("save", 3), ("close", None)]


def test_a_step_that_has_moved_the_policy_ends_before_the_run_stops():
    """Asked to stop within the second of three optimiser steps: the save is of the next step, not of a policy
    that stands between two; within the first: at once."""
    batch = Batch(microbatches=(build_microbatch([]),), totals=Totals(policy_weight=1, distilled_rollouts=0))
    for asked_at, (saved, accumulated) in {2: (1, 3), 0: (0, 0)}.items():
        events: list = []
        own = trainer(events, fails_at=("never", 0))
        own.reread = functools.partial(
            reread, refinements=[lambda reads, _: [read.microbatch for read in reads]]
        )
        own.pack = lambda samples: [batch] * 3
        own.alpha.passes = lambda step: (POLICY_TERM,)
        done = []

        def accumulate(*_, asked_at=asked_at, done=done, own=own):
            done.append(1)
            if len(done) == asked_at:
                own.world.stop._on_signal(signal.SIGUSR1, None)

        own.policy.accumulate, own.policy.world = accumulate, own.world
        own.policy.read = lambda *_, own=own, asked_at=asked_at, **__: (
            None if asked_at else own.world.stop._on_signal(signal.SIGUSR1, None)
        )
        with pytest.raises(StopRequested):
            own.train()
        assert events[-1] == ("save", saved) and len(done) == accumulated


def test_what_a_publish_sent_stands_among_the_steps_metrics(monkeypatch):
    for name in ("rollout_metrics", "lag_metrics", "block_metrics", "packing_metrics"):
        monkeypatch.setattr(trainer_module, name, lambda *_: {})
    own, recorded = trainer([], fails_at=("never", 0)), []
    sent = {"publish/sent_mib": 2.5, "publish/changed_share": 0.25}
    own.publisher.metrics = lambda: sent
    own.recorder.record = lambda step, metrics: recorded.append((step, metrics))
    Trainer.record(own, [], [], [], SimpleNamespace(scalars={}))
    ((step, metrics),) = recorded
    assert step == 0 and sent.items() <= metrics.items()
