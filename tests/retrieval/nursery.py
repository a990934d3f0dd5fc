"""The tests' side of rank_programs/nursery.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.local import free_port

START_LIMIT_S = 300


class Nursery:
    """Forks ranks and knows how they ended. Use as a context. corpus: a directory to search in, of any
    run."""

    def __init__(self, corpus: Path) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-u", "-m", "tests.rank_programs.nursery", str(corpus)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._codes: dict[int, int] = {}
        self._pending = b""
        assert self._next({}, START_LIMIT_S) == {"ready": True}

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def start(self, call: str, argument: Any, *, ranks: int, log: Path) -> Ranks:
        """call: "module:function", which gets the argument and returns an exit code. log: each rank's
        output goes to log.RANK."""
        order = {"call": call, "argument": argument, "ranks": ranks, "log": str(log), "port": free_port()}
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

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all; those that have ended get none."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if self._nursery.code(pid, 0) is None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(pid, number)

    def output(self) -> str:
        """What all ranks printed."""
        paths = [Path(f"{self._log}.{rank}") for rank in range(len(self.pids))]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())
