"""Handing the trained weights to the inference engine, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import deepspeed
from torch import Tensor, nn

from megatron_sd.distributed.collectives import together
from megatron_sd.errors import RolloutError
from megatron_sd.rollout.engine import WeightReceiver
from megatron_sd.training.policy import Policy

BUCKET_BYTES = 256 << 20

NamedParameters = list[tuple[str, nn.Parameter]]


class Publisher(Protocol):
    """Makes an engine sample from the policy's current weights."""

    def publish(self, policy: Policy, receiver: WeightReceiver, policy_version: int) -> None:
        """Collective: every rank calls it, with no generation in flight."""
        ...


class GatherPublisher:
    """Gathers full parameters on every rank, a bucket at a time, and hands them to that rank's engine.

    Besides the engine's own copy, no more than BUCKET_BYTES of full parameters exist at one time (or one parameter, if larger).
    """

    def publish(self, policy: Policy, receiver: WeightReceiver, policy_version: int) -> None:
        """Names are Hugging Face names; a tied weight is sent once. No rank returns before every rank's engine has the version,
        and an engine's RolloutError is raised on every rank, after the last gather."""
        stages = _Stages()
        stages.attempt(receiver.begin_update)
        for bucket in gathered_buckets(policy.named_parameters(), BUCKET_BYTES):
            stages.attempt(lambda: receiver.load_bucket(bucket))  # noqa: B023, it is called at once
        stages.attempt(lambda: receiver.finish_update(policy_version))
        together(policy.world, stages.result)


class _Stages:
    """Steps of which the first that fails ends the others, while the caller goes on with its collectives."""

    def __init__(self) -> None:
        self._failure: RolloutError | None = None

    def attempt(self, step: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                step()
            except RolloutError as error:
                self._failure = error

    def result(self) -> None:
        if self._failure is not None:
            raise self._failure


def gathered_buckets(parameters: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Full parameters by name, a bucket at a time; the tensors are valid until the next bucket is asked for.

    Collective under ZeRO-3: every rank must draw every bucket.
    """
    for bucket in split_buckets(parameters, bucket_bytes):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            yield [(name, parameter.detach()) for name, parameter in bucket]


def split_buckets(parameters: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int) -> Iterator[NamedParameters]:
    """Runs of parameters of at most bucket_bytes when full; each holds at least one."""
    bucket: NamedParameters = []
    filled = 0
    for name, parameter in parameters:
        size = full_numel(parameter) * parameter.element_size()
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, parameter))
        filled += size
    if bucket:
        yield bucket


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; its own numel() is 0 while ZeRO-3 holds it in shards."""
    return getattr(parameter, "ds_numel", parameter.numel())
