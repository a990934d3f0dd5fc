"""What the rollouter needs of an inference engine, and what publishing needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from megatron_sd.records import TokenIds


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One turn of one rollout.

    session: names the rollout; the prompt_ids of later requests of a session extend what the engine has
        already seen, so it may keep its KV cache between them. seed: of the rollout; the noise of the token
        at absolute position p is a function of (seed, p) alone. temperature: 0 is greedy. stop: strings
        after whose appearance in the completion's text sampling ends; the token that completes the string
        is kept whole.
    """

    session: str
    prompt_ids: TokenIds
    max_new_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """ids: [C] sampled ids, the end-of-sequence id included when it was sampled; logprobs: [C] natural logs
    under the sampling distribution softmax(logits / temperature) (temperature 1 when greedy); finish: why
    it ended."""

    ids: TokenIds
    logprobs: tuple[float, ...]
    finish: Literal["stop", "eos", "length"]
    policy_version: int


class InferenceEngine(Protocol):
    """Asynchronous generation; many `generate` calls are in flight at once and are batched by the engine.

    Rollouts are sampled between `wake` and `sleep`, which every rank calls, however little it has to sample
    (see `awake`).
    """

    policy_version: int

    def wake(self) -> None:
        """Rollouts are about to be sampled."""
        ...

    def sleep(self) -> None:
        """This rank's rollouts are over; returns when those of ranks that sample with it are, too."""
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion. Raises RolloutError when nothing can be returned."""
        ...

    def release(self, session: str) -> None:
        """The rollout is over: its cache may go, and a completion of it that is still in flight is
        aborted."""
        ...

    def close(self) -> None:
        """End whatever runs for the engine; it is not used again."""
        ...


@contextmanager
def awake(engine: InferenceEngine) -> Iterator[None]:
    """Around the rollouts of a batch."""
    engine.wake()
    try:
        yield
    finally:
        engine.sleep()


class WeightReceiver(Protocol):
    """What every engine does when it gets new weights; how they come in is one of the three below."""

    def begin_update(self) -> None:
        """Forget every cache; no generation may be in flight until the update ends."""
        ...

    def finish_update(self, policy_version: int) -> None:
        """The weights are in: completions from here on carry this version."""
        ...


class BucketReceiver(WeightReceiver, Protocol):
    """An engine that takes full parameters, bucket by bucket."""

    def load_bucket(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full parameters, by Hugging Face name."""
        ...


class WeightSharer(BucketReceiver, Protocol):
    """An engine of this process that can also read weights where the trainer has them."""

    def share_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Read full parameters, by Hugging Face name, in the caller's memory, which changes between updates
        only."""
        ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt to hand a version over, as workers are told of it.

    address: of the trainer's meeting point. number: of the attempt, counted from 1 by the trainer.
    """

    address: str
    number: int
    policy_version: int


class ShardedEngine(WeightReceiver, Protocol):
    """An engine whose workers hold a resharding ShardReceiver each. Every rank has a handle; the handles of
    ranks that own no worker do nothing."""

    def start_receiving(self, delivery: Delivery) -> Future[None]:
        """Make every worker of this handle call ShardReceiver.receive with the delivery's version and number
        at its meeting point, and return at once. The future ends when all have returned, and with the first
        error of one as soon as it is known."""
        ...

    def cancel_update(self) -> None:
        """The update failed: wait until no worker receives any more, and serve on with the version they
        still hold."""
        ...
