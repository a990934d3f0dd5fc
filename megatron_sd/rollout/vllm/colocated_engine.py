"""vLLM inside the trainer's ranks, on their own GPUs: tensor_parallel_size neighbouring ranks are one engine.

vLLM's external launcher gives every rank an engine of its own, which runs its part of the model and meets
the others in the layers; that works as long as all of them schedule alike. So the ranks tell each other of
new requests before every step (lockstep.py). Between batches the engine sleeps: its weights wait in host
memory and its KV cache is given back (CUDA only).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from megatron_sd.distributed.lockstep import Lockstep, News
from megatron_sd.distributed.world import World, use_device
from megatron_sd.errors import RolloutError
from megatron_sd.rollout.engine import Completion, Delivery, GenerationRequest
from megatron_sd.rollout.vllm.colocated_start import EngineMemory, RequestOutbox
from megatron_sd.rollout.vllm.request import Answer, Dialogue, ServedPolicy
from megatron_sd.search.tokens import TextCodec

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

POLL_S = 0.005  # how long a rank without work waits before it looks again at its peers


class ColocatedEngine:
    """InferenceEngine, BucketReceiver and ShardedEngine over a vLLM engine in this process.

    Every rank of the world makes one, and calls `wake`, `sleep` and the update's methods together with the
    others. An error of a step fails every request until the next publish.
    """

    def __init__(
        self,
        llm: LLMEngine,
        lockstep: Lockstep,
        codec: TextCodec,
        policy: ServedPolicy,
        world: World,
        *,
        timeout_s: float,
    ):
        self.policy_version = 0
        self.num_replicas = lockstep.num_groups
        self._llm = llm
        self._lockstep = lockstep
        self._dialogue = Dialogue(codec, policy)
        self._world = world
        self._timeout_s = timeout_s
        self._memory = EngineMemory(llm, can_sleep=world.device.type == "cuda")
        self._outbox = RequestOutbox()
        self._asked: dict[str, tuple[GenerationRequest, Future[Completion]]] = {}  # by key, of this rank
        self._key_of: dict[str, str] = {}  # by session
        self._num_asked = 0
        self._serving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._updating = False
        self._is_trained = False
        self._receiver = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="shards", initializer=use_device, initargs=(world.device,)
        )
        self._receiving: Future[None] | None = None
        self._rpc("init_weight_transfer_engine", {"policy": policy.description})
        self._memory.release()

    def _rpc(self, method: str, *arguments: Any) -> None:
        self._llm.collective_rpc(method, args=arguments)

    # ---- requests ----

    def wake(self) -> None:
        """Serve until every rank of the group sleeps."""
        if self._serving is not None:
            raise RolloutError(
                "wake was called twice, expected sleep in between: one batch of rollouts at a time"
            )
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
        self._outbox = RequestOutbox()
        self._memory.release()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises RolloutError for a request that cannot be served, for
        log-probabilities that are not finite, and when the engine failed."""
        self._check(request)
        key, answer = f"{self._world.rank}/{self._num_asked}", Future[Completion]()
        self._num_asked += 1
        self._asked[key], self._key_of[request.session] = (request, answer), key
        self._outbox.ask(key, (request.prompt_ids, self._dialogue.sampling(request)))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:  # whoever waited is gone; the engine must not go on for nobody
            if self._key_of.get(request.session) == key:
                self.release(request.session)
            raise
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
                f"session {request.session!r} asked for tokens during a weight update, or after something"
                f" failed: publish{reason}"
            )
        if self._serving is None:
            raise RolloutError(
                f"session {request.session!r} asked for tokens of an engine that sleeps: call wake first"
            )
        if request.session in self._key_of:
            raise RolloutError(
                f"session {request.session!r} asked for two completions at once, expected one: await the"
                " first"
            )
        self._dialogue.check(request)

    # ---- the thread that serves ----

    def _serve(self) -> None:
        """Steps of the engine, each after an exchange with the peers, until all of them leave."""
        try:
            use_device(self._world.device)
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
        # vLLM draws from torch's own generator, which is the trainer's
        with torch.random.fork_rng(devices=[]):
            outputs = self._llm.step()
        for output in outputs:
            request, answer = self._asked.pop(output.request_id, (None, None))
            if request is not None:
                (choice,) = output.outputs
                try:
                    _settle(
                        answer, self._dialogue.completion(request, _answer_of(choice), self.policy_version)
                    )
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
        """Completions from here on carry this version. Raises RolloutError when parameters are missing: it
        then stays closed."""
        if not self._updating:
            raise RolloutError("finish_update was called outside an update; call begin_update first")
        self._attempt("finish_weight_update")
        self._open(policy_version)

    def start_receiving(self, delivery: Delivery) -> Future[None]:
        """Make this rank's worker take its shard from the meeting point, and return at once."""
        shards = asdict(delivery) | {
            "replica": self._lockstep.number,
            "timeout_s": self._timeout_s / 4,  # a worker waits up to three times as long, and then says why
        }
        self._receiving = self._receiver.submit(self._rpc, "update_weights", {"shards": shards})
        return self._receiving

    def cancel_update(self) -> None:
        """A sharded update failed, and no weight changed: sample on under the version from before (or stay
        closed, before the first)."""
        if self._receiving is not None:
            self._receiving.exception()
        self._abandon()
        if self._is_trained:
            self._open(self.policy_version)

    def close(self) -> None:
        """The engine lives as long as its process: taking vLLM down takes the trainer's process group with
        it."""

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
        """End an update without a new version: the worker answers with an error, which is the way to
        end one."""
        try:
            self._rpc("update_weights", {"abandon": True})
        except Exception:  # the answer
            return


def _answer_of(choice: Any) -> Answer:
    ids = tuple(choice.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(choice.logprobs or (), ids))
    return Answer(
        ids=ids, logprobs=logprobs, finish_reason=choice.finish_reason, stop_reason=choice.stop_reason
    )


def _settle(answer: Future[Completion], outcome: Completion | BaseException) -> None:
    """Tell whoever waits; a future that was cancelled is nobody's."""
    if answer.set_running_or_notify_cancel():
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
