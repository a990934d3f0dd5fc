"""vLLM as the rollout engine: one or more servers, on this node or elsewhere; the rollouter does not notice
which.

Every completion names the weights it was sampled from, as vLLM itself labels them, and a server whose label
is not the engine's version is never used: a restarted server, or one that a publish did not reach, waits
for the next publish.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.rollout.engine import Completion, Delivery, GenerationRequest
from megatron_sd.rollout.homes import Homes
from megatron_sd.rollout.loop_thread import LoopThread
from megatron_sd.rollout.vllm.request import Answer, Dialogue, ReplicaLost, ServedPolicy
from megatron_sd.rollout.vllm.server_client import UNTRAINED, Replica
from megatron_sd.rollout.vllm.server_process import ServerProcess
from megatron_sd.rollout.vllm.weight_buckets import BucketServer
from megatron_sd.search.tokens import TextCodec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Servers:
    """The vLLM servers of a rank.

    processes: those of them that this rank started (and that serve by now). publishes: True on the one rank
    that hands these servers new weights. publish_host: the name under which their workers reach it.
    first_replica: the number of urls[0] among the num_replicas servers of all nodes. sharer: this rank's
    number among the num_sharers ranks that have the same servers.
    """

    urls: tuple[str, ...]
    processes: tuple[ServerProcess, ...] = ()
    publishes: bool
    publish_host: str
    first_replica: int = 0
    num_replicas: int
    sharer: int = 0
    num_sharers: int = 1


class VllmEngine:
    """InferenceEngine, BucketReceiver and ShardedEngine over vLLM servers.

    Servers of ours that ended, or hang, are started again before a publish. On a rank that does not
    publish, an update only changes the version it expects. Connecting waits for servers that are still
    loading; it raises RolloutError for one that is not there within start_timeout_s, ConfigError for one
    that serves another model or shorter sequences.
    """

    def __init__(
        self,
        servers: Servers,
        codec: TextCodec,
        policy: ServedPolicy,
        *,
        start_timeout_s: float,
        request_timeout_s: float,
    ):
        self.policy_version = 0
        self.max_length = policy.max_length
        self.num_replicas = servers.num_replicas
        self._dialogue = Dialogue(codec, policy)
        self._servers = servers
        self._replicas = [Replica(url, timeout_s=request_timeout_s) for url in servers.urls]
        self._processes = {process.url: process for process in servers.processes}
        self._publishes = servers.publishes
        self._first_replica = servers.first_replica
        self._start_timeout_s = start_timeout_s
        self._request_timeout_s = request_timeout_s
        self._label = UNTRAINED
        self._updating = False
        self._receiving: list[asyncio.Task[None]] = []
        self._in_flight: dict[str, Future[Completion]] = {}
        self._homes = Homes(
            num_servers=len(servers.urls), sharer=servers.sharer, num_sharers=servers.num_sharers
        )
        self._thread = LoopThread()
        self._buckets = (
            BucketServer(servers.publish_host, timeout_s=request_timeout_s) if servers.publishes else None
        )
        self._connect()

    def _connect(self) -> None:
        self._thread.run(
            self._on_all(self._replicas, lambda replica: replica.wait_until_there(self._start_timeout_s))
        )
        try:
            lengths = self._thread.run(self._on_all(self._replicas, self._meet))
        except RolloutError as error:
            raise ConfigError(f"rollout.vllm: {error}") from error
        for replica, length in zip(self._replicas, lengths):
            if length < self.max_length:
                raise ConfigError(
                    f"rollout.vllm: {replica.url} serves sequences of {length} tokens, expected"
                    f" rollout.max_rollout_tokens {self.max_length}; serve it with --max-model-len"
                    f" {self.max_length}"
                )

    async def _meet(self, replica: Replica) -> int:
        if self._publishes:
            await replica.introduce(self._dialogue.policy.description)
        return await replica.learn()

    async def _on_all(
        self, replicas: Sequence[Replica], action: Callable[[Replica], Awaitable[Any]]
    ) -> list[Any]:
        return await asyncio.gather(*map(action, replicas))

    # ---- requests ----

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises RolloutError for a request that cannot be served, for
        log-probabilities that are not finite, and when no server is left that has this version."""
        self._check(request)
        answer = self._thread.start(self._ask(request))
        self._in_flight[request.session] = answer
        try:
            return await asyncio.wrap_future(answer)
        finally:
            # not one that began after this one was released
            if self._in_flight.get(request.session) is answer:
                del self._in_flight[request.session]

    def wake(self) -> None:
        """Servers never sleep: their GPUs are their own."""

    def sleep(self) -> None:
        """See `wake`."""

    def release(self, session: str) -> None:
        """The rollout is over; a completion of it that is still in flight is aborted, in the server too."""
        answer = self._in_flight.pop(session, None)
        if answer is not None:
            answer.cancel()
        self._homes.end(session)

    def _check(self, request: GenerationRequest) -> None:
        if self._updating:
            raise RolloutError(
                f"session {request.session!r} asked for tokens during or after a failed weight update:"
                " publish"
            )
        if request.session in self._in_flight:
            raise RolloutError(
                f"session {request.session!r} asked for two completions at once, expected one: await the"
                " first"
            )
        self._dialogue.check(request)

    async def _ask(self, request: GenerationRequest) -> Completion:
        """From the replica that holds the rollout's keys and values; when it fails, from another."""
        for _ in self._replicas:
            living = [self._serves(replica) for replica in self._replicas]
            if not any(living):
                break
            replica = self._replicas[self._homes.place(request.session, request.prompt_ids, living)]
            try:
                choice = await replica.generate(request.prompt_ids, self._dialogue.sampling(request))
                return self._completion(request, replica, choice)
            except ReplicaLost as error:
                replica.failure = str(error)
                _log.warning("left alone until the next publish: %s", error)
        found = f"no vLLM server is left for {request.session!r}"
        raise RolloutError(f"{found}, expected 1 to {len(self._replicas)}: {self._failures()}")

    def _serves(self, replica: Replica) -> bool:
        """Whether it has not failed, and has this version's weights."""
        if replica.failure is None and replica.version != self._label:
            replica.failure = f"{replica.url} serves weights {replica.version!r}, expected {self._label!r}"
        return replica.failure is None

    def _failures(self) -> str:
        """Why no server is left; of our own, with what their logs say."""
        words = {url: f", {process.last_words()}" for url, process in self._processes.items()}
        return "; ".join(f"{replica.failure}{words.get(replica.url, '')}" for replica in self._replicas)

    def _completion(self, request: GenerationRequest, replica: Replica, choice: dict[str, Any]) -> Completion:
        if not choice["token_ids"]:
            raise ReplicaLost(
                f"{replica.url} returned no token ({choice['finish_reason']!r}), expected one or more"
            )
        versions = {span["version"] for span in choice["weight_versions"] or ()}
        if versions != {self._label}:
            raise ReplicaLost(
                f"{replica.url} sampled from weights {sorted(versions)}, not {self._label!r}: was it"
                " restarted?"
            )
        answer = Answer(
            ids=tuple(choice["token_ids"]),
            logprobs=tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )
        return self._dialogue.completion(request, answer, self.policy_version)

    # ---- weights ----

    def begin_update(self) -> None:
        """Every server stops and forgets its caches. Raises RolloutError while it samples, or when no
        server takes updates."""
        if self._in_flight:
            raise RolloutError(
                f"{len(self._in_flight)} completions are in flight, expected none during an update; await"
                " them"
            )
        self._updating = True
        self._homes.forget()
        self._revive()
        for replica in self._replicas:
            replica.failure = None
        if self._publishes:
            self._update("begin", lambda replica: replica.begin_update())

    def load_bucket(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand full parameters, by Hugging Face name, to every server. Raises RolloutError when no server
        took them."""
        if not self._updating:
            raise RolloutError("load_bucket was called outside an update; call begin_update first")
        if self._buckets is not None:
            bucket = self._buckets.offer(weights)
            self._update("load", lambda replica: replica.update(bucket=bucket))
            self._buckets.withdraw()

    def finish_update(self, policy_version: int) -> None:
        """Completions from here on carry this version. Raises RolloutError when parameters are missing: it
        then stays closed."""
        if not self._updating:
            raise RolloutError("finish_update was called outside an update; call begin_update first")
        label = str(policy_version)
        if self._publishes:
            self._update("finish", lambda replica: replica.finish_update(label))
        else:
            for replica in self._replicas:  # what they answer will say whether it is true
                replica.version = label
        self._label, self.policy_version, self._updating = label, policy_version, False

    def start_receiving(self, delivery: Delivery) -> Future[None]:
        """Make the workers of every server take their shards from the meeting point, while the trainer
        sends them, and return at once. The future ends with the first error."""
        return self._thread.start(self._receive(delivery))

    async def _receive(self, delivery: Delivery) -> None:
        if self._publishes:
            # a worker waits up to three times as long, and then says why
            patience_s = self._request_timeout_s / 4
            terms = asdict(delivery) | {"timeout_s": patience_s}
            self._receiving = [
                asyncio.create_task(replica.update(shards=terms | {"replica": self._first_replica + place}))
                for place, replica in enumerate(self._replicas)
            ]
            await asyncio.gather(*self._receiving)

    def cancel_update(self) -> None:
        """A sharded update failed, and no weight changed: when no worker receives any more, serve on under
        the version from before (or stay closed, before the first)."""
        if self._publishes:
            self._thread.run(self._serve_on(self._label))
        self._updating = self._label == UNTRAINED

    async def _serve_on(self, label: str) -> None:
        await asyncio.gather(*self._receiving, return_exceptions=True)
        for replica in self._replicas:
            try:
                await replica.abandon()
                await replica.serve_again(label)
            except RolloutError as error:
                replica.failure = str(error)

    def close(self) -> None:
        """End the servers that this rank started."""
        self._thread.run(self._on_all(self._replicas, lambda replica: replica.close()))
        for process in self._processes.values():
            process.end()
        for process in self._processes.values():
            process.stop()
        if self._buckets is not None:
            self._buckets.close()
        self._thread.stop()

    def _revive(self) -> None:
        """Start those of our servers again that ended, or hang."""
        failed = {replica.url for replica in self._replicas if replica.failure is not None}
        ended = [
            p for url, p in self._processes.items() if not p.is_running or (url in failed and not p.answers())
        ]
        for process in ended:
            _log.warning("starting the vLLM server at %s again: %s", process.url, process.last_words())
            process.kill()
            process.start()
        for process in ended:
            process.wait_until_ready(self._start_timeout_s)

    def _update(self, stage: str, action: Callable[[Replica], Awaitable[None]]) -> None:
        """One stage of an update on every server that has not failed an earlier one. Raises RolloutError
        when none is left."""

        async def attempt(replica: Replica) -> None:
            try:
                await action(replica)
            except RolloutError as error:
                replica.failure = f"{stage}: {error}"
                _log.warning("not updated: %s", replica.failure)

        self._thread.run(
            self._on_all([replica for replica in self._replicas if replica.failure is None], attempt)
        )
        if all(replica.failure is not None for replica in self._replicas):
            raise RolloutError(
                f"no vLLM server took the weights, expected 1 to {len(self._replicas)}: {self._failures()}"
            )
