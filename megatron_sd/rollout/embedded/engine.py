"""The embedded engine: any local Hugging Face causal language model, batched continuously in one asyncio
task.

Requests join and leave at any decode step. A conversation keeps its row of the KV cache between turns, so
that only what the environment appended is prefilled; equal prompts of a group are computed, stored and read
once. A rollout's tokens depend on its prompt, seed and weights: not on which other rollouts share the
batch, up to the rounding of differently shaped matrix products.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_sd.errors import RolloutError
from megatron_sd.machine import give_back_memory
from megatron_sd.pretrained.on_demand import stored_in
from megatron_sd.records import TokenIds
from megatron_sd.rollout.embedded.decoder import Feed, RowDecoder, Sampled
from megatron_sd.rollout.embedded.stop_strings import StopTable
from megatron_sd.rollout.embedded.weights import WeightTable
from megatron_sd.rollout.engine import Completion, GenerationRequest
from megatron_sd.search.tokens import TextCodec


@dataclass(eq=False)
class _Job:
    """A request in the engine and the future its caller awaits."""

    request: GenerationRequest
    future: asyncio.Future[Completion]


@dataclass(eq=False)
class _Session:
    """A conversation that owns a row. prompt_ids: of its newest turn. cached_ids: tokens whose keys and
    values the row holds."""

    row: int
    prompt_ids: TokenIds = ()
    cached_ids: TokenIds = ()


class TorchEngine:
    """InferenceEngine and WeightSharer over a model it owns (the caller must not train or share it). A
    model that was loaded on demand samples nothing before its first update.

    max_rows: conversations in the KV cache at one time; further requests wait. reuse_cache: False prefills
    the whole conversation every turn (a baseline for benchmarks).
    """

    def __init__(self, model: PreTrainedModel, codec: TextCodec, *, max_rows: int, reuse_cache: bool = True):
        self.policy_version = 0
        self._decoder = RowDecoder(model, max_rows=max_rows)
        self._reuse_cache = reuse_cache
        self._vocabulary_size = model.get_output_embeddings().weight.shape[0]
        self._stops = StopTable(codec, self._vocabulary_size)
        self._is_eos = np.zeros(self._vocabulary_size, dtype=bool)
        self._is_eos[[n for n in _eos_ids(model, codec) if n < self._vocabulary_size]] = True
        self._weights = WeightTable(model)
        self._updating = any(stored_in(parameter) is not None for parameter in model.parameters())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop every conversation and whatever is in flight."""
        self._decoder.reset()
        self._owners: list[str | None] = [None] * self._decoder.max_rows
        self._sessions: dict[str, _Session] = {}
        self._jobs: dict[str, _Job] = {}  # everything in flight, by session
        # those of them that have no row yet, or are about to return to theirs
        self._waiting: dict[str, _Job] = {}
        self._driver: asyncio.Task | None = None

    @property
    def max_length(self) -> int:
        """Tokens that one conversation may hold, set by the model's positions."""
        return self._decoder.max_length

    # ---- requests ----

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises RolloutError for a request that cannot be served and for non-finite
        logits."""
        loop = asyncio.get_running_loop()
        # the last loop is over, perhaps by an error: nothing of it can still be awaited
        if loop is not self._loop:
            self._forget()
            self._loop = loop
        self._check(request)
        job = _Job(request, loop.create_future())
        self._jobs[request.session] = self._waiting[request.session] = job
        if self._driver is None:
            self._driver = loop.create_task(self._drive())
        return await job.future

    def _check(self, request: GenerationRequest) -> None:
        session, ids, limit = request.session, request.prompt_ids, self.max_length
        if self._updating:
            raise RolloutError(
                f"session {session!r} asked for tokens during a weight update; call finish_update first"
            )
        if session in self._jobs:
            raise RolloutError(
                f"session {session!r} asked for two completions at once, expected one: await the first"
            )
        if not 0 < len(ids) < limit or request.max_new_tokens < 1:
            raise RolloutError(
                f"session {session!r} sent {len(ids)} prompt tokens and asked for {request.max_new_tokens},"
                f" expected 1 to {limit - 1} and at least 1: the model holds {limit} positions; lower"
                " rollout.max_rollout_tokens"
            )
        if not 0 <= min(ids) <= max(ids) < self._vocabulary_size:
            raise RolloutError(
                f"session {session!r} sent token ids from {min(ids)} to {max(ids)}, expected ids below the"
                f" model's vocabulary of {self._vocabulary_size}: the tokenizer does not belong to the model"
            )

    def wake(self) -> None:
        """Nothing to do: memory is taken when the first request comes."""

    def sleep(self) -> None:
        """Give back the memory of keys and values, unless completions are in flight."""
        if not self._jobs:
            self._forget()
            self._decoder.give_back()
            give_back_memory()

    def release(self, session: str) -> None:
        """Give the session's row back; a completion of it that is still in flight is cancelled."""
        job = self._jobs.pop(session, None)
        if job is not None:
            job.future.cancel()
        self._waiting.pop(session, None)
        state = self._sessions.pop(session, None)
        if state is not None:
            self._decoder.free(state.row)
            self._owners[state.row] = None

    def close(self) -> None:
        """Nothing outlives the object."""

    async def _drive(self) -> None:
        """Admit and decode until nothing is left. Callers run between steps: what they send at once joins
        at once."""
        try:
            while True:
                await asyncio.sleep(0)
                if self._waiting:
                    self._admit()
                if self._decoder.lanes.active.any():
                    self._compact()
                    self._settle(self._decoder.decode())
                elif not self._waiting:
                    break
        except Exception as error:
            self._fail_all(error)
        finally:
            self._driver = None

    def _fail_all(self, error: Exception) -> None:
        jobs = self._jobs
        self._forget()
        for job in jobs.values():
            if not job.future.done():
                job.future.set_exception(error)

    # ---- joining ----

    def _admit(self) -> None:
        """Give rows to waiting requests, first come first served, and prefill what their rows do not hold
        yet."""
        if None not in self._owners and not self._decoder.lanes.active.any():
            self._evict()
        # low rows first: a decode step computes rows up to the highest that is in use
        free = [row for row, owner in enumerate(self._owners) if owner is None][::-1]
        placed: dict[object, list[_Session]] = {}
        for name, job in list(self._waiting.items()):
            if name not in self._sessions:
                if not free:
                    continue
                self._open(name, free.pop())
            del self._waiting[name]
            session = self._start(name, job.request)
            # conversations that begin with the same prompt (a group's rollouts) are fed as one
            placed.setdefault(name if session.cached_ids else job.request.prompt_ids, []).append(session)
        feeds = [
            Feed(
                rows=tuple(s.row for s in group),
                prompt_ids=group[0].prompt_ids,
                start=len(group[0].cached_ids),
            )
            for group in placed.values()
        ]
        for sampled in self._decoder.prefill(feeds):
            self._settle(sampled)

    def _evict(self) -> None:
        """All rows are parked: if none of their conversations is coming back just now, the oldest one loses
        its row."""
        if self._waiting.keys().isdisjoint(self._sessions):
            self.release(next(iter(self._sessions)))

    def _open(self, name: str, row: int) -> None:
        self._owners[row] = name
        self._sessions[name] = _Session(row)

    def _start(self, name: str, request: GenerationRequest) -> _Session:
        """Begin a turn on the session's row, keeping what it holds if the prompt extends that."""
        session = self._sessions[name]
        held = session.cached_ids
        kept = min(len(held), len(request.prompt_ids) - 1)  # at least one token is fed, to have logits
        if (
            request.prompt_ids[: len(held)] != held[: len(request.prompt_ids)]
            or kept < self._decoder.lanes.shared[session.row]
        ):
            kept = 0
        session.prompt_ids, session.cached_ids = request.prompt_ids, held[:kept]
        self._decoder.lanes.start(
            session.row,
            length=len(session.cached_ids),
            max_new=min(request.max_new_tokens, self.max_length - len(request.prompt_ids)),
            temperature=request.temperature,
            seed=request.seed,
            stop_set=self._stops.number(request.stop),
        )
        return session

    def _compact(self) -> None:
        for low, high in self._decoder.compact():
            self._owners[low], self._owners[high] = self._owners[high], self._owners[low]
            for row in (low, high):
                if self._owners[row] is not None:
                    self._sessions[self._owners[row]].row = row

    # ---- leaving ----

    def _settle(self, sampled: Sampled) -> None:
        """Hand over the completions that the new tokens finish."""
        lanes, rows, ids = self._decoder.lanes, sampled.rows, sampled.ids
        broken = ~np.isfinite(sampled.logprobs)
        eos = self._is_eos[ids]
        maybe_stop = self._stops.lookup[lanes.stop_set[rows], ids]
        full = lanes.count[rows] >= lanes.max_new[rows]
        for n in np.flatnonzero(broken | eos | maybe_stop | full).tolist():
            row = int(rows[n])
            if broken[n]:
                self._break(row)
            elif maybe_stop[n] and self._stops.completed(int(lanes.stop_set[row]), lanes.completion(row)[0]):
                self._finish(row, "stop")
            elif eos[n] or full[n]:
                self._finish(row, "eos" if eos[n] else "length")

    def _finish(self, row: int, reason: Literal["stop", "eos", "length"]) -> None:
        """Hand the completion over and park the conversation."""
        name = self._owners[row]
        job, session = self._jobs.pop(name), self._sessions[name]
        ids, logprobs = self._decoder.lanes.completion(row)
        self._decoder.lanes.active[row] = False
        session.cached_ids = (*session.prompt_ids, *ids[:-1])  # the last token was never fed
        if not job.future.done():
            job.future.set_result(
                Completion(ids=ids, logprobs=logprobs, finish=reason, policy_version=self.policy_version)
            )
        if not self._reuse_cache:
            self.release(name)

    def _break(self, row: int) -> None:
        """Non-finite logits: the request fails."""
        name = self._owners[row]
        job = self._jobs.pop(name)
        self.release(name)
        self._decoder.wipe(row)
        if not job.future.done():
            job.future.set_exception(
                RolloutError(
                    f"session {name!r}: the model's logits are not finite at policy version"
                    f" {self.policy_version}, expected finite numbers; check the weights it was given"
                )
            )

    # ---- weights ----

    def rest(self) -> None:
        """Give back the memory of the weights, too: nobody asks for tokens before the next update, which
        brings them. Raises RolloutError when a generation is in flight."""
        self.begin_update()
        self._weights.give_back()
        give_back_memory()

    def begin_update(self) -> None:
        """Forget every cache. Raises RolloutError when a generation is in flight."""
        if self._jobs and self._loop is not None and self._loop.is_running():
            raise RolloutError(
                f"{len(self._jobs)} completions are in flight, expected none during an update; await them"
                " first"
            )
        self._forget()
        self._weights.begin()
        self._updating = True

    def load_bucket(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full parameters by Hugging Face name, in place. Raises RolloutError for a name or shape the
        model lacks."""
        if not self._updating:
            raise RolloutError("load_bucket was called outside an update; call begin_update first")
        self._weights.load(weights)

    def share_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Read full parameters in the caller's memory, which changes between updates only. Raises
        RolloutError for a name, shape, dtype or device that is not the model's."""
        self._weights.share(weights)

    def finish_update(self, policy_version: int) -> None:
        """Completions from here on carry this version. Raises RolloutError when parameters are missing: it
        then stays closed."""
        missing = self._weights.missing() if self._updating else ["all of them (no update was begun)"]
        if missing:
            raise RolloutError(
                f"the update lacks {len(missing)} parameters, such as {missing[:3]}; publish every parameter"
            )
        self._updating = False
        self.policy_version = policy_version


def _eos_ids(model: PreTrainedModel, codec: TextCodec) -> frozenset[int]:
    """End-of-sequence ids of the tokenizer and of the model's generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    return codec.eos_ids | (
        frozenset(own) if isinstance(own, list) else frozenset(() if own is None else (own,))
    )
