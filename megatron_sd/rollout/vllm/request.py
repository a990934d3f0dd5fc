"""One turn of a rollout put to vLLM, wherever it runs: what is accepted, how it is asked, and what the
answer means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sd.errors import RolloutError
from megatron_sd.records import TokenIds
from megatron_sd.rollout.embedded.stop_strings import StopTable
from megatron_sd.rollout.engine import Completion, GenerationRequest
from megatron_sd.rollout.sampling import splitmix64_of
from megatron_sd.search.tokens import TextCodec

LOWEST_LOGPROB = -9999.0  # what a server sends for NaN and -inf


class ReplicaLost(RolloutError):  # noqa: N818, it names a state
    """A server gave no answer, or one that says nothing more is to be expected of it. Another one may be
    asked."""


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """What vLLM must serve. description: options.describe. eos_ids: end a completion. max_length: of a
    rollout."""

    description: dict[str, Any]
    eos_ids: frozenset[int]
    vocabulary_size: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """vLLM's own words. ids, logprobs: [C]."""

    ids: TokenIds
    logprobs: tuple[float, ...]
    finish_reason: str | None
    stop_reason: str | int | None


class Dialogue:
    """Requests and answers of one policy."""

    def __init__(self, codec: TextCodec, policy: ServedPolicy):
        self.policy = policy
        self._eos_ids = sorted(policy.eos_ids)
        self._stops = StopTable(codec, policy.vocabulary_size)

    def check(self, request: GenerationRequest) -> None:
        """Raise RolloutError for a request that vLLM would refuse, or answer with nonsense."""
        session, ids, limit = request.session, request.prompt_ids, self.policy.max_length
        if not 0 < len(ids) < limit or not 1 <= request.max_new_tokens <= limit - len(ids):
            raise RolloutError(
                f"session {session!r} sent {len(ids)} prompt tokens and asked for {request.max_new_tokens},"
                f" expected 1 to {limit - 1}, and together at most {limit}, the engine's limit:"
                " rollout.max_rollout_tokens"
            )
        if not 0 <= min(ids) <= max(ids) < self.policy.vocabulary_size:
            raise RolloutError(
                f"session {session!r} sent token ids from {min(ids)} to {max(ids)}, expected ids below the"
                f" model's vocabulary of {self.policy.vocabulary_size}: the tokenizer does not belong to the"
                " model"
            )

    def sampling(self, request: GenerationRequest) -> dict[str, Any]:
        """vLLM's sampling parameters."""
        return {
            "temperature": request.temperature,
            "seed": turn_seed(request),
            "max_tokens": request.max_new_tokens,
            "stop": list(request.stop),
            "stop_token_ids": self._eos_ids,
            "logprobs": 0,  # of the sampled token alone
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # their text counts for stop strings
        }

    def completion(self, request: GenerationRequest, answer: Answer, policy_version: int) -> Completion:
        """The answer, cut behind the token that completes a stop string. Raises ReplicaLost for an aborted
        completion, RolloutError for log-probabilities that are not finite."""
        if not all(LOWEST_LOGPROB < value < math.inf for value in answer.logprobs):
            raise RolloutError(
                f"session {request.session!r}: a log-probability from vLLM is not finite at policy version"
                f" {policy_version}, expected finite numbers; check the weights it was given"
            )
        length = self._stops.first_completed(self._stops.number(request.stop), answer.ids)
        return Completion(
            ids=answer.ids[:length],
            logprobs=answer.logprobs[:length],
            finish="stop" if length is not None else finish_of(answer, self.policy.eos_ids),
            policy_version=policy_version,
        )


def turn_seed(request: GenerationRequest) -> int:
    """The seed of one turn, in [0, 2**63): a hash of the rollout's seed and the turn's place; turns must
    not repeat noise."""
    return splitmix64_of(request.seed, len(request.prompt_ids)) >> 1


def finish_of(answer: Answer, eos_ids: frozenset[int]) -> Literal["eos", "length"]:
    """Why a completion without a stop string ended. Raises ReplicaLost when it was aborted."""
    if answer.finish_reason == "length":
        return "length"
    if answer.ids and answer.ids[-1] in eos_ids:
        return "eos"
    raise ReplicaLost(
        f"a completion ended with {answer.finish_reason!r} ({answer.stop_reason!r}), expected stop or length"
    )
