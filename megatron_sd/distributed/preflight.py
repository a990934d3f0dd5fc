"""Nodes that meet before a run: what each found is exchanged through a store, so that one which never comes
can be named."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sd.errors import MegatronSdError

MESSAGE_BYTES = 16 << 20
ROUNDS = 5
POLL_S = 0.05
LATER_S = 20.0  # that nodes which are here may take for a further step


class Preflight:
    """One process of each node, numbered 0 to size - 1; number 0 holds the store. A node that has not come
    by the deadline is no longer waited for. Raises MegatronSdError when the first node is not there, or
    goes away."""

    def __init__(self, address: tuple[str, int], *, number: int, size: int, timeout_s: float):
        self._number = number
        self._deadline = time.monotonic() + timeout_s
        self._here = list(range(size))
        self._size = size
        host, port = address
        wait = timedelta(seconds=timeout_s)
        try:
            self._store = dist.TCPStore(
                host, port, size, is_master=number == 0, timeout=wait, wait_for_workers=False
            )
        except dist.DistError as error:
            raise MegatronSdError(
                f"the first node does not answer at {host}:{port} within {timeout_s:g} s: {error}"
            ) from error

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The JSON values of all nodes in their order; None for one that has given none."""
        try:
            self._store.set(f"{name}/{self._number}", json.dumps(value))
            values = [
                self._get(f"{name}/{number}") if number in self._here else None
                for number in range(self._size)
            ]
        except dist.DistError as error:
            raise MegatronSdError(f"the first node went away in the middle of the checks: {error}") from error
        self._here = [number for number in self._here if values[number] is not None]
        self._deadline = max(self._deadline, time.monotonic() + LATER_S)
        return values

    def leave(self) -> None:
        """The first node waits until the others have left: it holds their store."""
        self._store.set(f"left/{self._number}", "true")
        if self._number == 0:
            for number in self._here:
                self._get(f"left/{number}")

    def rates(self) -> tuple[float, float] | None:
        """Gigabytes a second of an all-reduce over all nodes, and of messages to and from the node's slower
        neighbour; NCCL on the first GPU, gloo without one. None for a lone node. Call it when all are here;
        raises MegatronSdError when messages do not get through."""
        if self._size == 1:
            return None
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        wait = timedelta(seconds=max(self._deadline - time.monotonic(), 1.0))
        world = {"store": self._store, "rank": self._number, "world_size": self._size, "timeout": wait}
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", **world)
            tensor = torch.ones(MESSAGE_BYTES // 4, device=device)
            reduced = self._timed(lambda: dist.all_reduce(tensor), device)
            turns = [neighbour(self._number, self._size, first) for first in (0, 1)]
            sent = [
                self._timed(lambda turn=turn: _to_and_fro(tensor, turn), device)
                for turn in turns
                if turn is not None
            ]
            dist.destroy_process_group()
        except RuntimeError as error:  # of torch.distributed, whatever the backend
            raise MegatronSdError(f"messages between nodes do not get through: {error}") from error
        return MESSAGE_BYTES / reduced / 1e9, 2 * MESSAGE_BYTES / max(sent) / 1e9

    def _timed(self, action, device: torch.device) -> float:
        """Seconds of the quickest of some rounds: other work on the node is not what is looked for."""
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return max(min(seconds), 1e-9)

    def _get(self, key: str) -> Any:
        while not self._store.check([key]):
            if time.monotonic() > self._deadline:
                return None
            time.sleep(POLL_S)
        return json.loads(self._store.get(key))


def neighbour(number: int, size: int, first: int) -> tuple[int, bool] | None:
    """With whom a node talks when the pairs begin at node `first`, and whether it speaks first; None for
    one that is left over.

    >>> [neighbour(number, 3, 0) for number in range(3)], [neighbour(number, 3, 1) for number in range(3)]
    ([(1, True), (0, False), None], [None, (2, True), (1, False)])
    """
    speaks = (number - first) % 2 == 0
    peer = number + 1 if speaks else number - 1
    return (peer, speaks) if number >= first and first <= peer < size else None


def _to_and_fro(tensor: torch.Tensor, turn: tuple[int, bool]) -> None:
    peer, speaks = turn
    for is_sender in (speaks, not speaks):
        (dist.send if is_sender else dist.recv)(tensor, peer)
