"""Tensor-parallel workers in processes of their own: plain tensors and a real ShardReceiver, in place of an
engine's workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_sd.errors import ReshardError
from megatron_sd.resharding import receiver as receiver_module
from megatron_sd.resharding.connection import worker_id
from megatron_sd.resharding.layout import WorkerId, WorkerLayout
from megatron_sd.rollout.engine import Delivery

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and no worker needs it
    from megatron_sd.training.publisher import ShardPublisher

WAIT_S = 120.0


class WorkerProcess:
    """One worker; its tensors are full of NaN until it has received."""

    def __init__(self):
        self.worker = WorkerId(replica=0, tp_rank=0, tp_size=1)
        context = multiprocessing.get_context("forkserver")  # which imports once, whatever their number
        context.set_forkserver_preload(["tests.resharding.fakes"])
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()

    def call(self, action: str, **arguments):
        """The action's value, or its error. Raises ReshardError when the process has ended."""
        try:
            self._pipe.send((action, arguments))
            value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ReshardError(f"{self.worker} has died") from error
        if isinstance(value, Exception):
            raise value
        return value

    def open(self, layout: WorkerLayout, address: str, **changes: Tensor | None) -> None:
        """Build the tensors of the layout and a receiver over them. changes: tensors of another form, or
        None for none."""
        specs = {t.spec.name: (t.spec.shape, t.spec.dtype) for t in layout.tensors}
        for name, tensor in changes.items():
            specs.pop(name, None)
            if tensor is not None:
                specs[name] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self.call("open", specs=specs, worker=self.worker, address=address)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors as they are now."""
        return {
            name: torch.frombuffer(raw, dtype=dtype).view(shape)
            for name, (raw, dtype, shape) in self.call("read").items()
        }

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class WorkerGroup:
    """ShardedEngine over worker processes. log: what the publisher did with it."""

    def __init__(self, num_workers: int, workers: Sequence[WorkerProcess] | None = None):
        self.workers = [WorkerProcess() for _ in range(num_workers)] if workers is None else list(workers)
        self.log: list[str] = []
        self.errors: list[str] = []  # of workers
        self.received: list[int] = []  # bytes, by worker, in the last update
        self.action = "receive"
        self._calls: list[Future] = []
        self._threads = ThreadPoolExecutor(max_workers=max(num_workers, 1))

    def first(self, num_workers: int) -> WorkerGroup:
        """A group of the first of these workers."""
        return WorkerGroup(num_workers, self.workers[:num_workers])

    def restart(self, number: int, publisher: ShardPublisher) -> None:
        """A new process in place of one that died."""
        self.workers[number].stop()
        self.workers[number] = WorkerProcess()
        self.enter(number, publisher)

    def join(self, publisher: ShardPublisher) -> None:
        """Become the workers that the publisher plans for: new tensors, new receivers."""
        for number in range(len(self.workers)):
            self.enter(number, publisher)

    def enter(self, number: int, publisher: ShardPublisher) -> None:
        """One of them."""
        self.workers[number].worker = worker_id(publisher.plan, number)
        self.workers[number].open(publisher.plan.layout_of(number), publisher.address)

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.stop()

    def begin_update(self) -> None:
        self.log.append("begin")

    def start_receiving(self, delivery: Delivery) -> Future:
        self.received = [0] * len(self.workers)
        done, left = Future(), set(range(len(self.workers)))

        def receive(number: int) -> None:
            try:
                self.received[number] = self.workers[number].call(
                    self.action, policy_version=delivery.policy_version, delivery=delivery.number
                )
            except ReshardError as error:
                self.errors.append(str(error))
                if not done.done():
                    done.set_exception(error)
            left.discard(number)
            if not left and not done.done():
                done.set_result(None)

        if not left:
            done.set_result(None)
        self._calls = [self._threads.submit(receive, number) for number in range(len(self.workers))]
        return done

    def finish_update(self, policy_version: int) -> None:
        self.log.append(f"finish {policy_version}")

    def cancel_update(self) -> None:
        wait(self._calls)
        self.log.append("cancel")


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most bytes of tensors that the action had allocated in this thread at one time, as torch's
    allocator counts."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(held, initial=0))


def _serve(pipe) -> None:
    """A worker process's life: actions from the pipe, until it closes."""
    torch.set_num_threads(1)
    state = _Worker()
    while True:
        try:
            action, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(state, action)(**arguments))
        except ReshardError as error:
            pipe.send(error)


class _Worker:
    def open(self, specs, worker: WorkerId, address: str) -> None:
        self.live = {
            name: torch.full(shape, float("nan"), dtype=getattr(torch, dtype))
            for name, (shape, dtype) in specs.items()
        }
        self.receiver = receiver_module.ShardReceiver(
            self.live, worker=worker, address=address, timeout_s=WAIT_S
        )

    def receive(self, policy_version: int, delivery: int) -> int:
        num_bytes = self.receiver.receive(policy_version, delivery)
        assert self.receiver.policy_version == policy_version
        return num_bytes

    def version(self) -> int:
        return self.receiver.policy_version

    def read(self) -> dict[str, tuple[bytearray, torch.dtype, torch.Size]]:
        return {
            name: (bytearray(tensor.view(-1).view(torch.uint8).numpy().tobytes()), tensor.dtype, tensor.shape)
            for name, tensor in self.live.items()
        }

    # ---- faults, once each ----

    def receive_measured(self, policy_version: int, delivery: int) -> int:
        return peak_bytes(lambda: self.receive(policy_version, delivery))

    def die_when_staged(self) -> None:
        """The process is killed in the next update, with everything received and nothing decided."""
        self.receiver._verify = lambda connection, sent: os.kill(os.getpid(), signal.SIGKILL)

    def die_while_receiving(self) -> None:
        """The process is killed in the next update after its first bucket."""
        inbox = self.receiver._connection.inbox
        inbox._unpack = inbox._take = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all, or what changed

    def damage(self, name: str, index: int) -> None:
        """An element changes between arrival and verification, in the next update."""
        verify = self.receiver._verify

        def damage_and_verify(connection, sent):
            connection.staged[name][index] += 1.0
            self.receiver._verify = verify
            verify(connection, sent)

        self.receiver._verify = damage_and_verify
