"""Ranks for tests, forked by a process that has imported everything: the tests' side of
rank_programs/nursery.py. Launchers, and whatever a fresh interpreter is the subject of, start programs
themselves."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.local import TRAIN, free_port
from megatron_sd.errors import MegatronSdError

START_LIMIT_S = 300
POLL_S = 0.05


FORKED_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}


@functools.cache
def nursery() -> Nursery:
    """The one of this process; it ends with it."""
    own = Nursery()
    atexit.register(own.close)
    return own


def run_ranks(
    call: str,
    argument: Any,
    *,
    ranks: int,
    limit_s: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What forked ranks printed that all ended well; see Nursery.start."""
    return nursery().start(call, argument, ranks=ranks, environment=environment).succeed(limit_s)


def start_forked(
    num_ranks: int, argv: Sequence[str], remarks: Sequence[str] = (), *, program: str = TRAIN
) -> None:
    """In the place of launch.local.start_ranks: the same ranks, forked. Raises MegatronSdError with what they
    printed when one fails."""
    try:
        print(run_ranks(f"{program}:main", list(argv), ranks=num_ranks))
    except AssertionError as error:
        raise MegatronSdError(str(error)) from error


class Nursery:
    """Forks ranks and knows how they ended. Use as a context, or close it."""

    def __init__(self) -> None:
        command = [sys.executable, "-u", "-m", "tests.rank_programs.nursery"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | FORKED_ENVIRONMENT
        )
        self._codes: dict[int, int] = {}
        self._pending = b""
        self._logs = tempfile.TemporaryDirectory(prefix="nursery")
        self._numbers = itertools.count()
        assert self._next({}, START_LIMIT_S) == {"ready": True}

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and all ranks with it."""
        self._process.stdin.close()
        self._process.wait(30)
        self._logs.cleanup()

    def start(
        self,
        call: str,
        argument: Any,
        *,
        ranks: int,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Ranks:
        """call: "module:function", which gets the argument and returns an exit code. log: each rank's
        output goes to log.RANK. environment: what differs from this process's."""
        log = log or Path(self._logs.name) / str(next(self._numbers))
        order = {"call": call, "argument": argument, "ranks": ranks, "log": str(log), "port": free_port()}
        order["environment"] = os.environ | FORKED_ENVIRONMENT | (environment or {})
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            answer = self._next({}, START_LIMIT_S)
            if "pids" in answer:
                return Ranks(self, answer["pids"], log)

    def train(self, argv: list[str], *, ranks: int, log: Path) -> Ranks:
        """`megatron_sd.train`, as a launcher starts it."""
        return self.start("megatron_sd.train:main", argv, ranks=ranks, log=log)

    def code(self, pid: int, limit_s: float) -> int | None:
        """The exit code of a rank, None if it has not ended by then."""
        deadline = time.monotonic() + limit_s
        while pid not in self._codes:
            left = deadline - time.monotonic()
            if left <= 0 or self._next(None, left) is None:
                return self._codes.get(pid)
        return self._codes[pid]

    def _next(self, nothing: Any, limit_s: float) -> Any:
        """The next answer; exit codes are noted on the way."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return nothing
            block = os.read(self._process.stdout.fileno(), 1 << 16)
            assert block, "the nursery has ended"
            self._pending += block
        line, self._pending = self._pending.split(b"\n", 1)
        answer = json.loads(line)
        if "code" in answer:
            self._codes[answer["pid"]] = answer["code"]
        return answer


class Ranks:
    """The ranks of one start."""

    def __init__(self, nursery: Nursery, pids: list[int], log: Path):
        self._nursery = nursery
        self.pids = pids
        self._log = log

    def code(self, rank: int, limit_s: float) -> int | None:
        """The exit code of one rank, None if it has not ended by then."""
        return self._nursery.code(self.pids[rank], limit_s)

    def wait(self, limit_s: float = 240.0) -> list[int]:
        """Exit codes, negative for a signal. Ranks that have not ended by then are killed, and the test
        fails."""
        deadline = time.monotonic() + limit_s
        codes = [self._nursery.code(pid, deadline - time.monotonic()) for pid in self.pids]
        if None in codes:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"ranks did not end within {limit_s} s ({codes}):\n{self.output()}")
        return codes

    def succeed(self, limit_s: float = 600.0) -> str:
        """What all ranks printed once all have ended with 0. When one ends otherwise, as under a launcher,
        or none does in time, the others are killed and the test fails."""
        deadline = time.monotonic() + limit_s
        while None in (codes := [self._nursery.code(pid, 0) for pid in self.pids]):
            if any(codes) or time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                break
            self._nursery.code(self.pids[codes.index(None)], POLL_S)
        assert codes == [0] * len(codes), f"exit codes {codes} within {limit_s} s:\n{self.output()[-8000:]}"
        return self.output()

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all; those that have ended get none."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if self._nursery.code(pid, 0) is None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(pid, number)

    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(self.output_of(rank) for rank in range(len(self.pids)))

    def output_of(self, rank: int) -> str:
        """What one rank printed, to stdout and stderr; empty before it has begun."""
        path = Path(f"{self._log}.{rank}")
        return path.read_text(errors="replace") if path.exists() else ""
