"""Starts ranks by forking: a process that has imported everything starts them in a moment, where a fresh
one needs 20 seconds.

Reads orders from stdin, a JSON object a line: {"ranks": 2, "port": 1234, "log": PATH, "call":
"module:function", "argument": X, "environment": {...}}. Answers with {"pids": [...]}, and for every rank
that ends with {"pid": ..., "code": ...}. All its ranks end with it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from megatron_sd.distributed.world import RANK_VARIABLES, end_process

MODULES = (
    *("megatron_sd.building.trainer", "megatron_sd.building.sft", "megatron_sd.train", "megatron_sd.sft"),
    *("tests.rank_programs.trust", "tests.rank_programs.publish_shards", "torch.utils.tensorboard"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which the first engine of a process imports: 5 seconds
)
POLL_S = 0.02
FAILED = 70  # the exit code of a rank that raised
PR_SET_PDEATHSIG = 1


def main() -> None:
    prepare()
    say({"ready": True})
    running: set[int] = set()
    pending = b""
    while True:
        if select.select([0], [], [], POLL_S if running else None)[0]:
            block = os.read(0, 1 << 16)
            if not block:
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pids = [start(order, rank) for rank in range(order["ranks"])]
                running |= set(pids)
                say({"pids": pids})
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def prepare() -> None:
    """Import, and compile the search: what every rank would do again. A thread would be missing in a fork."""
    for name in MODULES:
        importlib.import_module(name)
    # here, for processes that a rank starts would import them, too
    from tqdm import tqdm

    from megatron_sd.config import RetrieverConfig
    from megatron_sd.retrieval.choice import open_retriever
    from tests.retrieval.fakes import small_corpus

    tqdm.monitor_interval = 0  # or a progress bar would start a thread
    with tempfile.TemporaryDirectory() as directory:
        open_retriever(RetrieverConfig(corpus=str(small_corpus(Path(directory) / "corpus"))))
    threads = threading.enumerate()
    assert len(threads) == 1, f"found {threads}, expected one: a fork would lack the others"
    gc.freeze()


def start(order: dict[str, Any], rank: int) -> int:
    """The pid of a new rank."""
    pid = os.fork()
    if pid == 0:
        become_rank(order, rank)
    return pid


def become_rank(order: dict[str, Any], rank: int) -> NoReturn:
    """In the forked process: a rank as a launcher would start it, until it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    set_environment(order, rank)
    module, function = order["call"].split(":")
    code = FAILED
    try:
        code = getattr(importlib.import_module(module), function)(order["argument"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else FAILED
    except Exception:
        traceback.print_exc()
    end_process(code)


def set_environment(order: dict[str, Any], rank: int) -> None:
    """The order's, and what a launcher tells a rank; one rank alone needs no launcher and is told nothing."""
    os.environ.clear()
    os.environ.update(order["environment"])
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    if order["ranks"] > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": order["port"]}
        os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()})


def say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
