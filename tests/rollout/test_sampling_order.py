import threading
from dataclasses import replace

import pytest
import torch

from megatron_sd.errors import RolloutError
from megatron_sd.observability.metrics import lag_metrics
from megatron_sd.rollout.sampling_order import InStep, OneAhead
from tests.builders import group, rollout

CPU = torch.device("cpu")


class Engine:
    """Notes which weights each step is sampled from."""

    def __init__(self):
        self.version = 0
        self.sampled: dict[int, int] = {}
        self.is_busy = False

    def sample(self, step, number):
        self.is_busy = True
        self.sampled[step] = self.version
        self.is_busy = False
        return [step]


def train(order, engine, num_steps):
    for step in range(num_steps):
        assert order.take(step) == [step]
        order.settle()
        assert not engine.is_busy, "weights must not change under a running batch"
        engine.version = step + 1


def test_in_step_is_on_policy():
    engine = Engine()
    train(InStep(engine.sample), engine, 4)
    assert engine.sampled == {0: 0, 1: 1, 2: 2, 3: 3}


def test_one_ahead_is_one_step_behind_and_stops_with_the_run():
    engine = Engine()
    train(OneAhead(engine.sample, num_steps=4, device=CPU), engine, 4)
    assert engine.sampled == {0: 0, 1: 0, 2: 1, 3: 2}


def test_one_ahead_samples_while_the_step_goes_on():
    began, go = threading.Event(), threading.Event()

    def sample(step, number):
        if step == 1:
            began.set()
            assert go.wait(60)
        return [step]

    order = OneAhead(sample, num_steps=2, device=CPU)
    assert order.take(0) == [0]
    assert began.wait(60), "step 1 is being sampled though step 0 has not ended"
    go.set()
    assert order.take(1) == [1]


def test_an_error_ahead_is_raised_in_its_own_step():
    def sample(step, number):
        if step == 1:
            raise RolloutError("no server is left")
        return [step]

    order = OneAhead(sample, num_steps=3, device=CPU)
    assert order.take(0) == [0]
    order.settle()
    with pytest.raises(RolloutError, match="no server is left"):
        order.take(1)


def test_lag_metrics():
    searched = rollout(queries=["a"])
    first, last = searched.turns
    searched = replace(searched, turns=(replace(first, policy_version=4), replace(last, policy_version=5)))
    answered = rollout()
    answered = replace(answered, turns=(replace(answered.turns[0], policy_version=5),))
    found = lag_metrics([group([searched]), group([answered])], 5)
    assert found == {
        "rollout/mixed_versions_share": 0.5,
        "rollout/policy_version": 4.0,
        "rollout/policy_lag_steps": pytest.approx(1 / 3),
    }
    assert lag_metrics([], 5) == {}


def test_the_thread_that_samples_ahead_uses_its_ranks_gpu(monkeypatch):
    """A new thread's current device is GPU 0."""
    used = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((device, threading.current_thread()))
    )
    gpu = torch.device("cuda", 3)
    threads = OneAhead(lambda step, number: [threading.current_thread()], num_steps=1, device=gpu).take(0)
    assert used == [(gpu, threads[0])] and threads[0] is not threading.main_thread()
