"""Where a worker's next version waits until all of it is there: memory of its shard's size, on one node
open to the senders."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from megatron_sd.errors import ReshardError
from megatron_sd.resharding.layout import WorkerLayout

ALIGNMENT = 64  # elements; tensors begin at multiples of it

Token = Mapping[str, Any]  # what a sender needs to open a worker's memory; JSON


def num_staged(layout: WorkerLayout) -> int:
    """Elements of the memory for a worker's tensors, alignment included."""
    return sum(-(-tensor.spec.numel // ALIGNMENT) * ALIGNMENT for tensor in layout.tensors)


def tensor_views(memory: Tensor, layout: WorkerLayout) -> dict[str, Tensor]:
    """The worker's tensors, flat, in one flat memory of num_staged elements."""
    views, start = {}, 0
    for tensor in layout.tensors:
        views[tensor.spec.name] = memory[start : start + tensor.spec.numel]
        start += -(-tensor.spec.numel // ALIGNMENT) * ALIGNMENT
    return views


def padding_views(views: Mapping[str, Tensor], layout: WorkerLayout) -> Iterator[Tensor]:
    """The elements of the staged tensors that nobody sends."""
    for tensor in layout.tensors:
        if tensor.num_padding_rows:
            yield views[tensor.spec.name][-tensor.num_padding_rows * tensor.spec.num_columns :]


def host_id() -> str:
    """Equal for processes that can open each other's shared memory: same kernel, process namespace and
    user."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return (
        f"{boot.read_text().strip()} {os.readlink(namespace)} {os.getuid()}"
        if boot.is_file()
        else f"pid {os.getpid()}"
    )


def available_bytes() -> int:
    """Memory that may still be taken on this machine, as the kernel estimates it."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


class SharedMemory:
    """Anonymous memory that other processes of the node can open. It has no name: a killed process leaves
    nothing behind, and the size of /dev/shm does not limit it."""

    def __init__(self, numel: int, dtype: torch.dtype):
        num_bytes = max(numel * dtype.itemsize, 1)
        if num_bytes > available_bytes():
            raise ReshardError(
                f"the next version's shard needs {num_bytes / 2**30:.2f} GiB beside the current one, found"
                f" {available_bytes() / 2**30:.2f} GiB of free memory: use more tensor-parallel workers, or"
                " nodes"
            )
        self._file = os.memfd_create("megatron_sd_staging")
        self._closing = weakref.finalize(self, os.close, self._file)
        os.posix_fallocate(self._file, 0, num_bytes)
        self.tensor = _map(self._file, numel, dtype)
        self.token: Token = {"process": os.getpid(), "file": self._file}

    def close(self) -> None:
        """Give this process's hold on the memory up; it goes with the last mapping."""
        self._closing()


def open_shared_memory(token: Token, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A SharedMemory, as a flat tensor to write into; device: the CPU. Raises ReshardError when that
    process has gone."""
    path = f"/proc/{token['process']}/fd/{token['file']}"
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        raise ReshardError(
            f"the worker at process {token['process']} has gone ({error}): restart it and publish again"
        ) from error
    try:
        return _map(file, numel, dtype)
    finally:
        os.close(file)


def _map(file: int, numel: int, dtype: torch.dtype) -> Tensor:
    num_bytes = max(numel * dtype.itemsize, 1)
    memory = mmap.mmap(file, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return torch.frombuffer(memory, dtype=torch.uint8)[: numel * dtype.itemsize].view(dtype)


class CudaMemory:
    """CUDA memory that other processes of the node can open through an IPC handle. Not run yet."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device):
        self.tensor = torch.empty(numel, dtype=dtype, device=device)
        _, arguments = reduce_tensor(self.tensor)
        # tensor class, size, stride, offset, storage class and dtype are known to whoever opens it; the
        # rest names the memory
        handle = [part.hex() if isinstance(part, bytes) else part for part in arguments[6:]]
        self.token: Token = {"process": os.getpid(), "handle": handle}
        _OWN_CUDA_MEMORY[handle_key(self.token)] = self.tensor

    def close(self) -> None:
        """The memory goes with its tensor."""


# of this process, by handle_key
_OWN_CUDA_MEMORY: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()


def handle_key(token: Token) -> str:
    """Tells memories of one process apart."""
    return json.dumps(token["handle"])


def handle_parts(token: Token, device: torch.device) -> list[Any]:
    """What torch rebuilds the tensor from. The first part is the number of the worker's device among those
    that *it* sees, which is another GPU here, or none: it is replaced by ours, so that the memory is mapped
    where this process computes."""
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in token["handle"]]
    return [device.index, *parts[1:]]


def open_cuda_memory(token: Token, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A CudaMemory, as a flat tensor to write into from `device`. CUDA refuses to open a handle in the
    process that made it, so a worker in this process hands its tensor over as it is. Not run yet."""
    if token["process"] == os.getpid():
        return _OWN_CUDA_MEMORY[handle_key(token)]
    parts = handle_parts(token, device)
    return rebuild_cuda_tensor(Tensor, (numel,), (1,), 0, torch.UntypedStorage, dtype, *parts)


class OwnMemory:
    """Memory of this process alone."""

    token: Token = {}

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device):
        self.tensor = torch.empty(numel, dtype=dtype, device=device)

    def close(self) -> None:
        """The memory goes with its tensor."""
