"""Handing the trained weights to the inference engine: gathered whole or as each worker's shard from the
ranks that own it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from megatron_sd.config import PublishConfig
from megatron_sd.distributed.collectives import broadcast_object, gather_objects, together
from megatron_sd.distributed.world import first_node_address
from megatron_sd.errors import ReshardError, RolloutError
from megatron_sd.resharding.layout import check_parameters
from megatron_sd.resharding.names import UnknownArchitectureError, whole_parameters, worker_layouts
from megatron_sd.resharding.plan import make_plan
from megatron_sd.resharding.sender import ShardSender
from megatron_sd.resharding.staging import host_id
from megatron_sd.resharding.transport import MeetingPoint, publish_host
from megatron_sd.rollout.engine import BucketReceiver, Delivery, ShardedEngine, WeightSharer
from megatron_sd.training.lora import FullAdapter, adapter_of, merged, with_their_adapters
from megatron_sd.training.parallel.local_shards import LocalShards, full_numel, shard_layout, whole_shard
from megatron_sd.training.parallel.tensor import joined
from megatron_sd.training.policy import Policy

log = logging.getLogger(__name__)

BUCKET_BYTES = 256 << 20

NamedParameters = list[tuple[str, nn.Parameter]]


Receiver_contra = TypeVar("Receiver_contra", contravariant=True)


class Publisher(Protocol[Receiver_contra]):
    """Makes an engine, of the kind that it can serve, sample from the policy's current weights."""

    def publish(self, policy: Policy, receiver: Receiver_contra, policy_version: int) -> None:
        """Collective: every rank calls it, with no generation in flight."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last publish, on this rank; empty where there is nothing to say."""
        ...


class NoPublisher:
    """Nobody samples: the weights stay where they are."""

    def publish(self, policy: Policy, receiver: object, policy_version: int) -> None:
        """Nothing."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}


class SparePublisher:
    """Publishes where somebody samples from the weights, and spares the other steps their publish.

    is_due: by policy version, equal on all ranks.
    """

    def __init__(self, publisher: Publisher[Any], is_due: Callable[[int], bool]):
        self._publisher = publisher
        self._is_due = is_due
        self._has_published = False

    def publish(self, policy: Policy, receiver: Any, policy_version: int) -> None:
        """Collective, as the publisher's own; raises what it raises."""
        self._has_published = self._is_due(policy_version)
        if self._has_published:
            self._publisher.publish(policy, receiver, policy_version)

    def metrics(self) -> dict[str, float]:
        """The publisher's own, where it has just published."""
        return self._publisher.metrics() if self._has_published else {}


class GatherPublisher:
    """Gathers full parameters on every rank, a bucket at a time, and hands them to that rank's engine.

    Besides the engine's own copy, no more than BUCKET_BYTES of full parameters exist at one time (or one
    parameter, if larger).
    """

    def publish(self, policy: Policy, receiver: BucketReceiver, policy_version: int) -> None:
        """Names are Hugging Face names; a tied weight is sent once. No rank returns before every rank's
        engine has the version, and an engine's RolloutError is raised on every rank, after the last
        gather."""
        stages = _Stages()
        stages.attempt(receiver.begin_update)
        for bucket in gathered_buckets(policy.named_parameters(), BUCKET_BYTES):
            stages.attempt(lambda: receiver.load_bucket(bucket))  # noqa: B023, it is called at once
        stages.attempt(lambda: receiver.finish_update(policy_version))
        together(policy.world, stages.result)

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}


class InPlacePublisher:
    """Lets the embedded engine of a rank that is alone read the policy's own weights: nothing is copied.
    Weights with adapters are merged into the engine's copies of these."""

    def publish(self, policy: Policy, receiver: WeightSharer, policy_version: int) -> None:
        """Raises RolloutError when policy and engine are of two models."""
        receiver.begin_update()
        parameters = list(policy.named_parameters())
        receiver.share_weights((name, whole_shard(p)) for name, p in parameters if adapter_of(p) is None)
        for bucket in gathered_buckets(
            ((name, p) for name, p in parameters if adapter_of(p) is not None), BUCKET_BYTES
        ):
            receiver.load_bucket(bucket)
        receiver.finish_update(policy_version)

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}


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


class ShardPublisher:
    """Sends each tensor-parallel worker the elements of its shard, from the ranks that own them; nothing is
    gathered.

    dtype: of the policy's parameters, as model.dtype. address: of the meeting point, for the workers'
    ShardReceiver. num_bytes: that this rank sent in the last publish. changed_share: of this rank's elements,
    how many had other bits than in the version before; None where that was not looked at. Raises
    UnknownArchitectureError, ConfigError when the model cannot be cut for tp_size workers, and ReshardError
    when policy and model directory differ.
    """

    def __init__(self, policy: Policy, config: PublishConfig, *, dtype: str, tp_size: int, num_replicas: int):
        self._master, world = config.source == "master", policy.world
        dtype = "float32" if self._master else dtype
        model = policy.model.config.to_dict()
        source = shard_layout(policy.named_parameters(), world_size=world.size, dtype=dtype)
        workers = worker_layouts(model, tp_size=tp_size, dtype=dtype)
        check_parameters(source, whole_parameters(model, dtype=dtype))
        self.plan = make_plan(source, workers, num_replicas=num_replicas)
        self.num_bytes = 0
        self.changed_share: float | None = None
        self._rank = world.rank
        timeout_s = config.timeout_s
        host = publish_host(
            config.host, gather_objects(world, host_id()), launcher_address=first_node_address()
        )
        meeting = MeetingPoint.host(host, timeout_s=timeout_s) if world.is_first else None
        self.address = broadcast_object(world, meeting and meeting.address)
        meeting = meeting or MeetingPoint.join(self.address, timeout_s=timeout_s)
        self._timeout_s = timeout_s
        self._attempts = config.attempts
        self._sender = ShardSender(meeting, self.plan, config, rank=world.rank, device=world.device)

    def publish(self, policy: Policy, receiver: ShardedEngine, policy_version: int) -> None:
        """Raises ReshardError on every rank when a worker failed in every attempt: all still hold what they
        had, and `publish` may be repeated once the worker is back."""
        for attempt in range(1, self._attempts + 1):
            try:
                self._hand_over(policy, receiver, policy_version)
                return
            except ReshardError as error:  # the same one on every rank
                if attempt == self._attempts:
                    raise
                log.warning("version %d was not handed over, trying again: %s", policy_version, error)

    def _hand_over(self, policy: Policy, receiver: ShardedEngine, policy_version: int) -> None:
        adapters = full_adapters(policy.named_parameters())
        shards = LocalShards(
            policy.named_parameters(),
            self.plan.source,
            rank=self._rank,
            master=self._master,
            adapters=adapters,
        )
        receiver.begin_update()
        receiving = receiver.start_receiving(
            Delivery(self.address, self._sender.num_deliveries + 1, policy_version)
        )
        receiving.add_done_callback(self._notice_failure)
        try:
            self.num_bytes = self._sender.send(shards, policy_version)
            self.changed_share = self._share_of(self._sender.num_changed)
            receiving.result(timeout=self._timeout_s)
        except Exception:  # whatever it was: the engine is not left closed
            receiver.cancel_update()
            raise
        receiver.finish_update(policy_version)

    def metrics(self) -> dict[str, float]:
        """publish/sent_mib, and publish/changed_share where it was looked at: of this rank's part."""
        share = {} if self.changed_share is None else {"publish/changed_share": self.changed_share}
        return {"publish/sent_mib": self.num_bytes / 2**20} | share

    def _share_of(self, num_elements: int | None) -> float | None:
        """Of this rank's elements."""
        own = [self.plan.source.owned(spec.numel, self._rank) for spec in self.plan.source.parameters]
        return None if num_elements is None else num_elements / sum(stop - start for start, stop in own)

    def close(self) -> None:
        """Leave the workers."""
        self._sender.close()

    def _notice_failure(self, receiving: Future) -> None:
        """A worker whose engine reports an error is not waited for."""
        if not receiving.cancelled() and receiving.exception() is not None:
            self._sender.give_up(str(receiving.exception()))


def sharded_or_gathering(
    policy: Policy, config: PublishConfig, *, dtype: str, tp_size: int, num_replicas: int
) -> Publisher[Any]:
    """A ShardPublisher, or for a model family without a shard layout, with a warning, a GatherPublisher."""
    try:
        return ShardPublisher(policy, config, dtype=dtype, tp_size=tp_size, num_replicas=num_replicas)
    except UnknownArchitectureError as error:
        log.warning("%s", error)
        return GatherPublisher()


def gathered_buckets(
    parameters: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Full parameters by name, adapters merged and parts joined, a bucket at a time; valid until the next
    bucket is asked for.

    Collective under ZeRO-3 and tensor parallelism: every rank must draw every bucket.
    """
    for bucket in split_buckets(parameters, bucket_bytes):
        with deepspeed.zero.GatheredParameters(with_their_adapters(parameter for _, parameter in bucket)):
            yield [(name, joined(parameter, merged(parameter))) for name, parameter in bucket]


def full_adapters(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, FullAdapter]:
    """By the weight's name: the adapters of the model, whole on every rank. Collective under ZeRO-3; they
    are small beside it."""
    adapted = [
        (name, adapter) for name, parameter in parameters if (adapter := adapter_of(parameter)) is not None
    ]
    found: dict[str, FullAdapter] = {}
    for name, adapter in adapted:
        with deepspeed.zero.GatheredParameters([adapter.a, adapter.b]):
            a, b = (part.detach().to(torch.float32, copy=True) for part in (adapter.a, adapter.b))
            found[name] = FullAdapter(a=a, b=b, scale=adapter.scale)
    return found


def split_buckets(
    parameters: Iterable[tuple[str, nn.Parameter]], bucket_bytes: int
) -> Iterator[NamedParameters]:
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
