"""What trainer ranks and workers tell each other when a session begins, and the boxes that follow from it.

trainer rank 0   open      the plan and the terms
trainer rank r   rank/r    where it runs
worker n         worker/n  where it runs, and the tensors it really has
trainer rank 0   wire      how to exchange; or the session ends, naming what does not fit
worker n         memory/n  how a sender on the same node opens its memory
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megatron_sd.config import PublishConfig
from megatron_sd.errors import ReshardError
from megatron_sd.resharding.changed_buckets import ChangesInbox, ChangesOutbox
from megatron_sd.resharding.changes import LARGEST
from megatron_sd.resharding.exchange import (
    BucketBuffers,
    BucketInbox,
    BucketOutbox,
    DirectInbox,
    DirectOutbox,
    Inbox,
    Outbox,
)
from megatron_sd.resharding.layout import (
    Rectangle,
    ShardLayout,
    TensorSpec,
    WorkerId,
    WorkerLayout,
    WorkerTensor,
    check_worker,
)
from megatron_sd.resharding.plan import ReshardPlan
from megatron_sd.resharding.staging import (
    CudaMemory,
    OwnMemory,
    SharedMemory,
    host_id,
    num_staged,
    open_cuda_memory,
    open_shared_memory,
    tensor_views,
)
from megatron_sd.resharding.transport import GroupWire, Session

log = logging.getLogger(__name__)

Memory = SharedMemory | CudaMemory | OwnMemory
OPEN_MEMORY = {"shared_memory": open_shared_memory, "cuda_ipc": open_cuda_memory}  # else buckets travel


def worker_id(plan: ReshardPlan, worker: int) -> WorkerId:
    """Of a worker's number among all replicas."""
    replica, tp_rank = divmod(worker, len(plan.workers))
    return WorkerId(replica=replica, tp_rank=tp_rank, tp_size=len(plan.workers))


def ranks(plan: ReshardPlan, key: str) -> dict[str, str]:
    """key/r -> what to call trainer rank r."""
    return {f"{key}/{rank}": f"trainer rank {rank}" for rank in range(plan.source.world_size)}


def workers(plan: ReshardPlan, key: str) -> dict[str, str]:
    """key/n -> what to call worker n."""
    return {f"{key}/{worker}": str(worker_id(plan, worker)) for worker in range(plan.num_workers)}


def open_session(session: Session, plan: ReshardPlan, terms: PublishConfig) -> None:
    """Trainer rank 0: offer the plan, look at everybody and decide the wire. Raises ReshardError naming the
    worker whose tensors are not what the plan expects; nothing has been sent then."""
    session.post("open", {"plan": asdict(plan), "terms": asdict(terms)})
    hosts = session.wait_for(ranks(plan, "rank"))
    found = session.wait_for(workers(plan, "worker"))
    for worker, description in enumerate(found):
        specs = {
            name: TensorSpec(name=name, shape=tuple(shape), dtype=dtype)
            for name, shape, dtype in description["tensors"]
        }
        check_worker(worker_id(plan, worker), plan.layout_of(worker), specs)
    wire = choose_wire(terms.wire, [*hosts, *found])
    log.info("weights reach %d workers over %s", plan.num_workers, wire)
    if terms.changes_only and wire in OPEN_MEMORY:
        log.info("publish.changes_only has no effect: ranks write into the workers' memory over %s", wire)
    session.post("wire", wire)


def whereabouts(device: torch.device) -> dict[str, Any]:
    """What decides which wires can reach a process."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return {"host": host_id(), "device": device.type, "gpu": gpu}


def choose_wire(wanted: str, parties: Sequence[Mapping[str, Any]]) -> str:
    """The wire that reaches everybody, from their whereabouts. Raises ReshardError when the wanted one does
    not."""
    one_node = len({party["host"] for party in parties}) == 1
    all_cuda = all(party["device"] == "cuda" for party in parties)
    if wanted == "auto":
        wanted = (
            ("cuda_ipc" if all_cuda else "shared_memory") if one_node else ("nccl" if all_cuda else "gloo")
        )
    if wanted in OPEN_MEMORY and not one_node:
        raise ReshardError(
            f"publish.wire is {wanted}, but ranks and workers run on several nodes: expected gloo, nccl or"
            " auto"
        )
    if wanted in ("cuda_ipc", "nccl") and not all_cuda:
        raise ReshardError(
            f"publish.wire is {wanted}, but not every rank and worker has CUDA tensors: expected auto"
        )
    gpus = Counter(party["gpu"] for party in parties if party.get("gpu"))
    if wanted == "nccl" and (shared := [gpu for gpu, count in gpus.items() if count > 1]):
        raise ReshardError(
            f"publish.wire: nccl would join {gpus[shared[0]]} parties on GPU {shared[0]}, which NCCL refuses"
            " (a rank and a vLLM worker share it): expected one party a GPU; set rollout.vllm.publish gather"
        )
    return wanted


def make_outbox(
    session: Session, plan: ReshardPlan, terms: PublishConfig, *, rank: int, device: torch.device
) -> Outbox:
    """Trainer rank `rank`'s side of the wire that was decided."""
    dtype, bucket_numel = getattr(torch, plan.dtype), bucket_elements(plan, terms)
    (wire,) = session.wait_for({"wire": "trainer rank 0"}, patience=2)
    if wire in OPEN_MEMORY:
        windows = {}
        for worker, token in enumerate(session.wait_for(workers(plan, "memory"))):
            layout = plan.layout_of(worker)
            windows[worker] = tensor_views(
                OPEN_MEMORY[wire](token, num_staged(layout), dtype, device), layout
            )
        return DirectOutbox(plan, rank, windows, bucket_numel=bucket_numel, device=device)
    channel = GroupWire(session, wire, rank, [*ranks(plan, "").values(), *workers(plan, "").values()])
    buffers = BucketBuffers(bucket_numel, dtype, _buffer_device(wire, device))
    box = ChangesOutbox if terms.changes_only else BucketOutbox
    return box(plan, rank, channel, buffers, bucket_numel=bucket_numel, device=device)


def make_inbox(
    session: Session, plan: ReshardPlan, terms: PublishConfig, *, worker: int, device: torch.device
) -> tuple[Inbox, Memory, dict[str, Tensor]]:
    """Worker `worker`'s side, its memory for the next version, and its staged tensors there, flat, by
    name."""
    dtype, layout = getattr(torch, plan.dtype), plan.layout_of(worker)
    (wire,) = session.wait_for({"wire": "trainer rank 0"}, patience=2)
    memory: Memory
    if wire == "shared_memory":
        memory = SharedMemory(num_staged(layout), dtype)
    elif wire == "cuda_ipc":
        memory = CudaMemory(num_staged(layout), dtype, device)
    else:
        memory = OwnMemory(num_staged(layout), dtype, device)
    staged = tensor_views(memory.tensor, layout)
    if wire in OPEN_MEMORY:
        session.post(f"memory/{worker}", memory.token)
        return DirectInbox(layout.numel * plan.item_bytes), memory, staged
    party = plan.source.world_size + worker
    channel = GroupWire(session, wire, party, [*ranks(plan, "").values(), *workers(plan, "").values()])
    bucket_numel = bucket_elements(plan, terms)
    buffers = BucketBuffers(bucket_numel, dtype, _buffer_device(wire, device))
    box = ChangesInbox if terms.changes_only else BucketInbox
    return box(plan, worker, channel, buffers, bucket_numel=bucket_numel, staged=staged), memory, staged


def bucket_elements(plan: ReshardPlan, terms: PublishConfig) -> int:
    """Elements of a bucket."""
    return min(max(int(terms.bucket_mib * 2**20) // plan.item_bytes, 1), LARGEST)


def _buffer_device(wire: str, device: torch.device) -> torch.device:
    return device if wire == "nccl" else torch.device("cpu")


def plan_from_plain(plain: Mapping[str, Any]) -> ReshardPlan:
    """The plan whose asdict came as JSON."""
    source = plain["source"]
    return ReshardPlan(
        source=ShardLayout(
            parameters=tuple(map(_spec, source["parameters"])), world_size=source["world_size"]
        ),
        workers=tuple(
            WorkerLayout(
                tp_rank=w["tp_rank"], tp_size=w["tp_size"], tensors=tuple(map(_tensor, w["tensors"]))
            )
            for w in plain["workers"]
        ),
        num_replicas=plain["num_replicas"],
    )


def _spec(plain: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=plain["name"], shape=tuple(plain["shape"]), dtype=plain["dtype"])


def _tensor(plain: Mapping[str, Any]) -> WorkerTensor:
    pieces = (
        Rectangle(**{**piece, "rows": tuple(piece["rows"]), "columns": tuple(piece["columns"])})
        for piece in plain["pieces"]
    )
    return WorkerTensor(
        spec=_spec(plain["spec"]), pieces=tuple(pieces), num_padding_rows=plain["num_padding_rows"]
    )
