"""Several workers at a time over a list of runs; one that dies costs the run it was at, and no other."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.grid.worker import ANSWER
from megatron_sd.distributed.world import environment_of_others

DONE = "done"
RUNS_PER_PROCESS = 40  # a process keeps some 35 MB of every DeepSpeed engine that it made
COMMAND = (sys.executable, "-m", "eval.grid.worker")


@dataclass(frozen=True, kw_only=True)
class Order:
    """A run's name and the line that a worker reads."""

    name: str
    line: str


class Worker:
    """A worker process, started when the first order comes, and again after it died or ran RUNS_PER_PROCESS
    orders."""

    def __init__(self, command: Sequence[str], device: int | None, log: Path):
        self._command = command
        self._environment = _environment(device)
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._is_ended = False
        self._num_runs = 0  # of this process

    def run(self, order: Order) -> str:
        """Hand in an order and wait: DONE, or what went wrong."""
        if self._is_ended:
            return "not started"
        process = self._running()
        try:
            process.stdin.write(order.line + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
        except BrokenPipeError:
            pass
        code = process.wait()
        return f"its process ended with exit code {code}; {self._log} holds what it said"

    def close(self) -> None:
        """Let it end."""
        if self._process is not None and self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait()

    def kill(self) -> None:
        """End it now, for good; its run is lost."""
        self._is_ended = True
        if self._process is not None:
            self._process.kill()

    def _running(self) -> subprocess.Popen[str]:
        if self._num_runs == RUNS_PER_PROCESS:
            self.close()
        if self._process is None or self._process.poll() is not None:
            self._num_runs = 0
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self._environment,
                )
        self._num_runs += 1
        return self._process


def run_all(
    orders: Sequence[Order],
    *,
    num_workers: int,
    devices: Sequence[int],
    log_dir: Path,
    on_end: Callable[[str, str], None],
    command: Sequence[str] = COMMAND,
) -> None:
    """Run every order, num_workers at a time. on_end(name, what the worker said) is called as each ends,
    one at a time.

    On KeyboardInterrupt the workers are ended; finished runs stay.
    """
    waiting: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for order in orders:
        waiting.put(order)
    num_workers = min(num_workers, len(orders))
    workers = [
        Worker(command, devices[number % len(devices)] if devices else None, log_dir / f"worker_{number}.log")
        for number in range(num_workers)
    ]
    ended: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_serve, args=(worker, waiting, ended), daemon=True) for worker in workers
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in orders:
            on_end(*ended.get())
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    for thread in threads:
        thread.join()


def _serve(
    worker: Worker, waiting: queue.SimpleQueue[Order], ended: queue.SimpleQueue[tuple[str, str]]
) -> None:
    while True:
        try:
            order = waiting.get_nowait()
        except queue.Empty:
            break
        ended.put((order.name, worker.run(order)))
    worker.close()


def _environment(device: int | None) -> Mapping[str, str]:
    """One thread each: several runs share the machine. A device each, where there are some."""
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return environment_of_others() | own | ({} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)})
