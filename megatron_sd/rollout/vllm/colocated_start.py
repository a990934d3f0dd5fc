"""What a vLLM engine in a rank's own process needs: its start beside the trainer, its memory, requests from
another thread."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sd.config import ModelConfig, RolloutConfig
from megatron_sd.distributed.lockstep import News
from megatron_sd.distributed.world import World, is_launched, set_environment
from megatron_sd.rollout.vllm.options import engine_environment, engine_options

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# keeps the weights, in host memory: an evaluation and the next step may sample from one version
SLEEP_LEVEL = 1


class RequestOutbox:
    """What the rollouts' thread has for the serving thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests: list[tuple[str, Any]] = []
        self._aborted: list[str] = []
        self._leaves = False

    def ask(self, key: str, what: Any) -> None:
        """Put a request."""
        with self._changed:
            self._requests.append((key, what))
            self._changed.notify()

    def abort(self, key: str) -> None:
        """Take one back, also one that was not sent yet."""
        with self._changed:
            self._aborted.append(key)
            self._changed.notify()

    def leave(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._leaves = True
            self._changed.notify()

    def take(self, patience_s: float) -> News:
        """All that has come; waits up to patience_s for something."""
        with self._changed:
            if patience_s:
                self._changed.wait_for(lambda: self._requests or self._aborted, patience_s)
            aborted = set(self._aborted)
            requests = tuple(request for request in self._requests if request[0] not in aborted)
            news = News(requests=requests, aborted=tuple(self._aborted), leaves=self._leaves)
            self._requests, self._aborted = [], []
            return news


class EngineMemory:
    """The GPU memory of the engine, by vLLM's tags; without sleep mode it is always there."""

    def __init__(self, llm: LLMEngine, *, can_sleep: bool):
        self._llm = llm
        self._can_sleep = can_sleep
        self._missing: set[str] = set()

    def take(self, *tags: str) -> None:
        """Have these back."""
        wanted = sorted(self._missing.intersection(tags))
        if wanted:
            self._llm.wake_up(wanted)
            self._missing.difference_update(wanted)

    def release(self) -> None:
        """Give everything to the trainer."""
        if self._can_sleep:
            self.take("weights", "kv_cache")  # vLLM keeps what it finds
            self._llm.sleep(SLEEP_LEVEL)
            self._missing = {"weights", "kv_cache"}


def start_llm(model: ModelConfig, rollout: RolloutConfig, world: World) -> LLMEngine:
    """vLLM in this process; every rank of the world calls it. The trainer's random numbers are left as they
    are.

    Raises whatever vLLM raises."""
    on_cpu = world.device.type == "cpu"
    set_environment(engine_environment(on_cpu=on_cpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    # in a run's own output; set it to see more
    set_environment({"VLLM_LOGGING_LEVEL": "ERROR"}, replace=False)
    options = engine_options(model, rollout, on_cpu=on_cpu) | {
        "distributed_executor_backend": "external_launcher" if is_launched() else "uni",
        "enable_sleep_mode": not on_cpu,
        "async_scheduling": False,
        "use_tqdm_on_load": False,
    }
    with _own_random_numbers(), _out_of_sight("llvmlite.binding.ffi"):
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from megatron_sd.rollout.vllm.server_main import check_head_dim

        check_head_dim(model.path)
        if on_cpu:
            _meet_over_gloo()
        return LLMEngine.from_engine_args(EngineArgs(**options))


def _meet_over_gloo() -> None:
    """On CPUs vLLM's workers meet in shared memory whose name, under an external launcher, is the same in
    every run: another run would be in the way, and so would one that was killed. Where ranks do not agree
    on a name, vLLM takes torch's collectives."""
    from vllm.distributed.device_communicators import cpu_communicator

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(
        lambda communicator: f"rank {communicator.rank}"
    )


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """vLLM seeds every generator of the process when it starts."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002, it is vLLM's
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _out_of_sight(name: str) -> Iterator[None]:
    """On CPUs vLLM 0.32 looks into every object of every module when it starts, and stumbles over
    llvmlite's library (numba's, which searching needs), since that answers to any name."""
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module
