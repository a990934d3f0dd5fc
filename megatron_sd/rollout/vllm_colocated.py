"""vLLM inside the trainer's ranks, on their own GPUs: tensor_parallel_size neighbouring ranks are one engine.

vLLM's external launcher gives every rank an engine of its own, which runs its part of the model and meets the others in the
layers; that works as long as all of them schedule alike. So the ranks tell each other of new requests before every step
(lockstep.py). Between batches the engine sleeps: its weights wait in host memory and its KV cache is given back (CUDA only).
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sd.config import ModelConfig, RolloutConfig
from megatron_sd.distributed.lockstep import Lockstep, News
from megatron_sd.distributed.world import World
from megatron_sd.errors import RolloutError
from megatron_sd.rollout.engine import Completion, GenerationRequest
from megatron_sd.rollout.vllm_command import engine_environment, engine_options
from megatron_sd.rollout.vllm_request import Answer, Dialogue, ServedPolicy
from megatron_sd.search.tokens import TextCodec

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

POLL_S = 0.005  # how long a rank without work waits before it looks again at its peers
SLEEP_LEVEL = 1  # keeps the weights, in host memory: an evaluation and the next step may sample from one version


class ColocatedEngine:
    """InferenceEngine, WeightReceiver and training/publisher.py's ShardedEngine over a vLLM engine in this process.

    Every rank of the world makes one, and calls `wake`, `sleep` and the update's methods together with the others. An error of
    a step fails every request until the next publish. meeting_point: where this rank's worker finds the trainer's shards.
    """

    def __init__(
        self, llm: LLMEngine, lockstep: Lockstep, codec: TextCodec, policy: ServedPolicy, world: World, *, timeout_s: float
    ):
        self.policy_version = 0
        self.meeting_point = ""
        self.num_replicas = lockstep.num_groups
        self._llm = llm
        self._lockstep = lockstep
        self._dialogue = Dialogue(codec, policy)
        self._world = world
        self._timeout_s = timeout_s
        self._memory = _Memory(llm, can_sleep=world.device.type == "cuda")
        self._outbox = _Outbox()
        self._asked: dict[str, tuple[GenerationRequest, Future[Completion]]] = {}  # by key, of this rank
        self._key_of: dict[str, str] = {}  # by session
        self._num_asked = 0
        self._serving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._updating = False
        self._is_trained = False
        self._receiver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._receiving: Future[None] | None = None
        self._rpc("init_weight_transfer_engine", {"policy": policy.description})
        self._memory.release()

    def _rpc(self, method: str, *arguments: Any) -> None:
        self._llm.collective_rpc(method, args=arguments)

    # ---- requests ----

    def wake(self) -> None:
        """Serve until every rank of the group sleeps."""
        if self._serving is not None:
            raise RolloutError("wake was called twice, expected sleep in between: one batch of rollouts at a time")
        self._memory.take("weights", "kv_cache")
        self._serving = threading.Thread(target=self._serve, name="vllm", daemon=True)
        self._serving.start()

    def sleep(self) -> None:
        """Serve on until the other ranks of the group need nothing any more, either."""
        if self._serving is None:
            return
        self._outbox.leave()
        with self._world.pulse.waiting():
            self._serving.join()
        self._serving = None
        self._outbox = _Outbox()
        self._memory.release()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises RolloutError for a request that cannot be served, for log-probabilities that are not
        finite, and when the engine failed."""
        self._check(request)
        key, answer = f"{self._world.rank}/{self._num_asked}", Future[Completion]()
        self._num_asked += 1
        self._asked[key], self._key_of[request.session] = (request, answer), key
        self._outbox.ask(key, (request.prompt_ids, self._dialogue.sampling(request)))
        try:
            return await asyncio.wrap_future(answer)
        finally:
            if self._key_of.get(request.session) == key:
                del self._key_of[request.session]

    def release(self, session: str) -> None:
        """The rollout is over; a completion of it that is still in flight is aborted."""
        key = self._key_of.pop(session, None)
        if key is not None and (asked := self._asked.pop(key, None)) is not None:
            asked[1].cancel()
            self._outbox.abort(key)

    def _check(self, request: GenerationRequest) -> None:
        if self._updating or self._failure is not None:
            reason = f": {self._failure!r}" if self._failure is not None else ""
            raise RolloutError(
                f"session {request.session!r} asked for tokens during a weight update, or after something failed: publish{reason}"
            )
        if self._serving is None:
            raise RolloutError(f"session {request.session!r} asked for tokens of an engine that sleeps: call wake first")
        if request.session in self._key_of:
            raise RolloutError(f"session {request.session!r} asked for two completions at once, expected one: await the first")
        self._dialogue.check(request)

    # ---- the thread that serves ----

    def _serve(self) -> None:
        """Steps of the engine, each after an exchange with the peers, until all of them leave."""
        try:
            is_idle = True
            while True:
                parts, all_leave = self._lockstep.exchange(self._outbox.take(POLL_S if is_idle else 0.0))
                for news in parts:
                    self._apply(news)
                is_idle = not self._llm.has_unfinished_requests()
                if is_idle and all_leave:
                    return
                if not is_idle:
                    self._step()
        except Exception as error:  # the boundary of a thread: whoever waits is told
            self._failure = error
            for _, answer in list(self._asked.values()):
                _settle(answer, RolloutError(f"vLLM failed in this rank: {error!r}"))

    def _apply(self, news: News) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if news.aborted:
            self._llm.abort_request(list(news.aborted))
        for key, (prompt_ids, sampling) in news.requests:
            parameters = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
            self._llm.add_request(key, {"prompt_token_ids": list(prompt_ids)}, parameters)

    def _step(self) -> None:
        with torch.random.fork_rng(devices=[]):  # vLLM draws from torch's own generator, which is the trainer's
            outputs = self._llm.step()
        for output in outputs:
            request, answer = self._asked.pop(output.request_id, (None, None))
            if request is not None:
                (choice,) = output.outputs
                try:
                    _settle(answer, self._dialogue.completion(request, _answer_of(choice), self.policy_version))
                except RolloutError as error:
                    _settle(answer, error)

    # ---- weights ----

    def begin_update(self) -> None:
        """Raises RolloutError while it samples."""
        if self._serving is not None:
            raise RolloutError("an update began while rollouts are sampled, expected it between two batches")
        self._updating, self._failure = True, None
        self._memory.take("weights")
        self._attempt("start_weight_update")

    def load_bucket(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load full parameters, by Hugging Face name. Raises RolloutError when vLLM refuses them."""
        if not self._updating:
            raise RolloutError("load_bucket was called outside an update; call begin_update first")
        self._attempt("update_weights", {"tensors": list(weights)})

    def finish_update(self, policy_version: int) -> None:
        """Completions from here on carry this version. Raises RolloutError when parameters are missing: it then stays closed."""
        if not self._updating:
            raise RolloutError("finish_update was called outside an update; call begin_update first")
        self._attempt("finish_weight_update")
        self._open(policy_version)

    def start_receiving(self, policy_version: int) -> Future[None]:
        """Make this rank's worker take its shard from the meeting point, and return at once."""
        shards = {
            "address": self.meeting_point,
            "replica": self._lockstep.number,
            "policy_version": policy_version,
            "timeout_s": self._timeout_s / 4,  # a worker waits up to three times as long, and then says why
        }
        self._receiving = self._receiver.submit(self._rpc, "update_weights", {"shards": shards})
        return self._receiving

    def cancel_update(self) -> None:
        """A sharded update failed, and no weight changed: sample on under the version from before (or stay closed, before the
        first)."""
        if self._receiving is not None:
            self._receiving.exception()
        self._abandon()
        if self._is_trained:
            self._open(self.policy_version)

    def close(self) -> None:
        """The engine lives as long as its process: taking vLLM down takes the trainer's process group with it."""

    def _open(self, policy_version: int) -> None:
        self._llm.reset_prefix_cache()
        self.policy_version, self._updating, self._is_trained = policy_version, False, True

    def _attempt(self, method: str, *arguments: Any) -> None:
        """One call of an update; the worker forgets the update when it fails."""
        try:
            self._rpc(method, *arguments)
        except Exception as error:  # whatever vLLM raises
            self._abandon()
            raise RolloutError(f"vLLM in this rank did not take the weights ({method}): {error}") from error

    def _abandon(self) -> None:
        """End an update without a new version: the worker answers with an error, which is the way to end one."""
        try:
            self._rpc("update_weights", {"abandon": True})
        except Exception:  # the answer
            return


class _Outbox:
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


class _Memory:
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


def _answer_of(choice: Any) -> Answer:
    ids = tuple(choice.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(choice.logprobs or (), ids))
    return Answer(ids=ids, logprobs=logprobs, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason)


def _settle(answer: Future[Completion], outcome: Completion | BaseException) -> None:
    """Tell whoever waits; a future that was cancelled is nobody's."""
    if answer.set_running_or_notify_cancel():
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def start_llm(model: ModelConfig, rollout: RolloutConfig, world: World) -> LLMEngine:
    """vLLM in this process; every rank of the world calls it. The trainer's random numbers are left as they are.

    Raises whatever vLLM raises."""
    on_cpu = world.device.type == "cpu"
    os.environ |= engine_environment(on_cpu=on_cpu) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # in a run's own output; set it to see more
    options = engine_options(model, rollout, on_cpu=on_cpu) | {
        "distributed_executor_backend": "external_launcher" if "RANK" in os.environ else "uni",
        "enable_sleep_mode": not on_cpu,
        "async_scheduling": False,
        "use_tqdm_on_load": False,
    }
    with _own_random_numbers(), _out_of_sight("llvmlite.binding.ffi"):
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from megatron_sd.rollout.vllm_server import check_head_dim

        check_head_dim(model.path)
        if on_cpu:
            _meet_over_gloo()
        return LLMEngine.from_engine_args(EngineArgs(**options))


def _meet_over_gloo() -> None:
    """On CPUs vLLM's workers meet in shared memory whose name, under an external launcher, is the same in every run: another run
    would be in the way, and so would one that was killed. Where ranks do not agree on a name, vLLM takes torch's collectives."""
    from vllm.distributed.device_communicators import cpu_communicator

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"rank {communicator.rank}")


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
    """On CPUs vLLM 0.32 looks into every object of every module when it starts, and stumbles over llvmlite's library (numba's,
    which searching needs), since that answers to any name."""
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module
