"""How trainer ranks and workers talk: a shared key-value store for words, a process group of their own for
bytes.

The store lives in trainer rank 0. Everything said belongs to a session; a session ends with the first
failure, and its reason is what everybody raises. Values are JSON: whoever reaches the port can disturb a
run, not run code.
"""

from __future__ import annotations

import ipaddress
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_sd.errors import ConfigError, ReshardError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0005, 0.02
LOOPBACK = "127.0.0.1"
# between two questions whether a transfer is done, and whether the session has ended
POLL_S, LOOK_S = 0.0002, 0.5


def publish_host(wanted: str | None, host_ids: Sequence[str], *, launcher_address: str | None) -> str:
    """Where rank 0 hosts the meeting point. wanted: publish.host; host_ids: of all ranks. Raises
    ConfigError when ranks of several nodes would look for it on their own."""
    num_nodes = len(set(host_ids))
    if num_nodes == 1:
        return wanted or LOOPBACK
    host = wanted or launcher_address
    if host is None or _is_loopback(host):
        raise ConfigError(
            f"publish.host: found {host!r} for ranks on {num_nodes} nodes, expected the address of rank 0's"
            " node as the others see it: pass --publish.host ADDRESS, or start the ranks with MASTER_ADDR"
            " set to it"
        )
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.startswith("localhost.")


class MeetingPoint:
    """The store, by address ("host:port")."""

    def __init__(self, store: dist.TCPStore, address: str):
        self._store = store
        self.address = address

    @classmethod
    def host(cls, host: str, *, timeout_s: float) -> MeetingPoint:
        """Serve the store from this process, at a free port; `host`: this machine's address as the others
        see it."""
        store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        return cls(store, f"{host}:{store.port}")

    @classmethod
    def join(cls, address: str, *, timeout_s: float) -> MeetingPoint:
        """Raises ReshardError when nobody serves the store there."""
        host, _, port = address.rpartition(":")
        try:
            return cls(
                dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s)), address
            )
        except (dist.DistError, ValueError) as error:
            raise ReshardError(
                f"no meeting point at {address!r} within {timeout_s:g} s ({error}); expected the address that"
                " the trainer prints"
            ) from error

    def post(self, key: str, value: Any) -> None:
        """Say something, once."""
        with self._reachable():
            self._store.set(key, json.dumps(value))

    def post_first(self, key: str, value: Any) -> None:
        """Say it unless somebody has said something else."""
        with self._reachable():
            self._store.compare_set(key, "", json.dumps(value))

    def forget(self, key: str) -> None:
        """Nobody will ask for this again."""
        with self._reachable():
            self._store.delete_key(key)

    def has(self, *keys: str) -> bool:
        """Whether all of them have been said."""
        with self._reachable():
            return self._store.check(list(keys))

    def read(self, key: str) -> Any:
        """What was said."""
        with self._reachable():
            return json.loads(self._store.get(key))

    def prefixed(self, prefix: str) -> dist.PrefixStore:
        """A corner of the store for a process group."""
        return dist.PrefixStore(prefix, self._store)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise ReshardError(
                f"the meeting point at {self.address} is gone ({error}): trainer rank 0 has ended"
            ) from error


class Session:
    """What is said between one connection of all parties and the first failure."""

    def __init__(self, meeting: MeetingPoint, number: int, timeout_s: float):
        self.meeting = meeting
        self.number = number
        self.timeout_s = timeout_s

    @classmethod
    def of_everybody(cls, meeting: MeetingPoint, timeout_s: float) -> Session:
        """What is said outside of sessions; it never ends."""
        return cls(meeting, 0, timeout_s)

    def post(self, key: str, value: Any = None) -> None:
        """Say something, once."""
        self.meeting.post(f"{self.number}/{key}", value)

    def post_in(self, transfer: int, key: str, value: Any = None) -> None:
        """Say something about a transfer; of the last but one, which everybody has left, the same is
        forgotten."""
        self.post(f"{transfer}/{key}", value)
        if transfer > 2:
            self.meeting.forget(f"{self.number}/{transfer - 2}/{key}")

    def has(self, key: str) -> bool:
        """Whether it has been said."""
        return self.meeting.has(f"{self.number}/{key}")

    def wait_for(self, owners: Mapping[str, str], *, patience: float = 1.0) -> list[Any]:
        """What the keys say, in order; owners: who is to say each. Raises ReshardError with the reason when
        the session ends, and naming who has not spoken after `patience` times the session's timeout."""
        keys = [f"{self.number}/{key}" for key in owners]
        limit_s = patience * self.timeout_s
        deadline, pause_s = time.monotonic() + limit_s, FIRST_PAUSE_S
        while not self.meeting.has(*keys):
            if (reason := self.closed()) is not None:
                raise ReshardError(reason)
            if time.monotonic() > deadline:
                silent = [owner for key, owner in zip(keys, owners.values()) if not self.meeting.has(key)]
                raise ReshardError(
                    f"no answer within {limit_s:g} s from {', '.join(silent)}: restart it and publish again"
                )
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)
        return [self.meeting.read(key) for key in keys]

    def close(self, reason: str) -> None:
        """End the session for everybody; the first reason stands."""
        self.meeting.post_first(f"{self.number}/closed", reason)

    def closed(self) -> str | None:
        """Why the session ended, if it did."""
        return self.meeting.read(f"{self.number}/closed") if self.has("closed") else None

    @contextmanager
    def ended_by_errors(self, let_go: Callable[[], None]) -> Iterator[None]:
        """An error inside ends the session for everybody; all raise its first reason. Then lets go of what
        belonged to it."""
        try:
            yield
        except Exception as error:  # whatever it was: nobody shall wait for this process
            try:
                self.close(str(error))
                raise ReshardError(self.closed()) from error
            finally:
                let_go()


def delivery_key(number: int) -> str:
    """Under which trainer rank 0 says, outside of sessions, in which of them a delivery takes place."""
    return f"delivery/{number}"


def session_of(delivery: int, everybody: Session, *, patience: float = 1.0) -> int:
    """The number of the session in which a delivery takes place, once trainer rank 0 has said it. Raises
    ReshardError when it does not, as `Session.wait_for` does."""
    (number,) = everybody.wait_for({delivery_key(delivery): "trainer rank 0"}, patience=patience)
    return int(number)


def until_completed(work: Any, peer: str, session: Session) -> None:
    """Ask a transfer until it is done. Raises ReshardError for its error, when the session has ended, and
    naming the peer when it takes longer than the session's time limit."""
    deadline, next_look = time.monotonic() + session.timeout_s, time.monotonic() + LOOK_S
    while not work.is_completed():
        now = time.monotonic()
        if now > deadline:
            raise ReshardError(
                f"{peer} moved nothing within {session.timeout_s:g} s over NCCL: restart it and publish again"
            )
        if now > next_look:  # the store is asked rarely
            next_look = now + LOOK_S
            if (reason := session.closed()) is not None:
                raise ReshardError(reason)
        time.sleep(POLL_S)
    if (error := work.exception()) is not None:
        raise ReshardError(
            f"{peer} has stopped answering ({_first_line(error)}): restart it and publish again"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Until the buffer may be used again; on CUDA, by what is enqueued from here on. Raises
        ReshardError naming the peer."""
        ...


class Wire(Protocol):
    """Moves buffers between numbered parties: trainer ranks first, then the workers."""

    def send(self, buffer: Tensor, peer: int) -> Pending:
        """Begin to send a contiguous buffer."""
        ...

    def receive(self, buffer: Tensor, peer: int) -> Pending:
        """Begin to fill a contiguous buffer."""
        ...

    def close(self) -> None:
        """Hang up: whoever waits for this party is told."""
        ...


class GroupWire:
    """A Wire over a process group beside the default one: gloo for buffers in host memory, NCCL for CUDA's.

    NCCL has not been run yet; parties that share a GPU cannot use it. Its transfers are asked whether they
    are done, instead of waited for: a wait only orders streams, and a dead peer would be noticed by torch's
    watchdog alone, which ends the process.
    """

    def __init__(self, session: Session, backend: str, party: int, names: Sequence[str]):
        store, timeout = (
            session.meeting.prefixed(f"{session.number}/{backend}"),
            timedelta(seconds=session.timeout_s),
        )
        self._names = names
        self._session = session
        self._polls = backend == "nccl"
        self._pending: weakref.WeakSet[_GroupPending] = weakref.WeakSet()
        self._group: Any = None
        try:
            if backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store, party, len(names), options)
            else:
                self._group = dist.ProcessGroupGloo(store, party, len(names), timeout)
        except RuntimeError as error:
            raise ReshardError(
                f"{names[party]} could not connect to {', '.join(names)} over {backend}: {error}"
            ) from error

    def send(self, buffer: Tensor, peer: int) -> Pending:
        """Begin to send a contiguous buffer."""
        return self._begin(lambda: self._group.send([buffer], peer, 0), peer)

    def receive(self, buffer: Tensor, peer: int) -> Pending:
        """Begin to fill a contiguous buffer."""
        return self._begin(lambda: self._group.recv([buffer], peer, 0), peer)

    def _begin(self, begin: Callable[[], Any], peer: int) -> _GroupPending:
        pending = _GroupPending(begin, self._names[peer], self._session if self._polls else None)
        self._pending.add(pending)
        return pending

    def close(self) -> None:
        """Drop the connections. Transfers under way would keep them open, and the peers waiting for what
        never comes."""
        under_way = [pending for pending in self._pending if not pending.is_done()]
        for pending in self._pending:
            pending.drop()
        if self._polls and under_way and self._group is not None:
            self._group.abort()  # or NCCL's kernels wait on for ever, and so does whoever synchronises
        self._group = None


class _GroupPending:
    """A Work of torch's, whose errors name the peer. polled: the session whose end and time limit end the
    wait, too."""

    def __init__(self, begin: Callable[[], Any], peer: str, polled: Session | None = None):
        self._peer = peer
        self._polled = polled
        with self._named():
            self._work = begin()

    def wait(self) -> None:
        with self._named():
            if self._polled is not None:
                until_completed(self._work, self._peer, self._polled)
            self._work.wait()

    def is_done(self) -> bool:
        """Whether nothing is under way any more."""
        return self._work is None or self._work.is_completed()

    def drop(self) -> None:
        self._work = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ReshardError(
                f"{self._peer} has stopped answering ({_first_line(error)}): restart it and publish again"
            ) from error
