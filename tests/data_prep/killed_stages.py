"""A stage of `sd-search data` in a process of its own, in small pieces, killed at the moment a test
chooses."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_prep.passages import chunk, runs, table
from data_prep.sources import questions, rows

SMALL = {(runs, "_READ_ROWS"): 3, (table, "ROWS_PER_BATCH"): 8, (table, "ROWS_PER_SHARD"): 32}
CHANGES = ("replace", "rename", "unlink", "rmdir")  # of os: whatever makes work finished, or clears it away


@dataclass(frozen=True, kw_only=True)
class Start:
    """kill_before: the how manieth change of CHANGES it does not live to make; None: it is not killed. log:
    gets a byte for each row that is decoded or cut, and then a line break and the number of changes it
    made."""

    stage: str  # import, chunk, encode or index
    config: Any
    log: Path
    kill_before: int | None = None


def launch(start: Start) -> BaseProcess:
    """The process, which forks from one that has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data_prep.killed_stages"])
    process = context.Process(target=_run, args=(start,))
    process.start()
    return process


def run(start: Start) -> tuple[int, int, int]:
    """Exit code, rows that were read (of encode: shards that were encoded), changes that were made (0 when
    it was killed)."""
    start.log.write_bytes(b"")
    process = launch(start)
    process.join()
    read, _, changes = start.log.read_bytes().partition(b"\n")
    return process.exitcode, len(read), int(changes or 0)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Shards and batches of a few rows."""
    before = {place: getattr(*place) for place in SMALL}
    try:
        for (module, name), value in SMALL.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def _run(start: Start) -> None:
    with small_pieces():
        _run_small(start)


def _run_small(start: Start) -> None:
    log = os.open(start.log, os.O_WRONLY | os.O_APPEND)
    decode_row, cut = rows.decode_row, chunk.cut
    rows.decode_row = lambda line: (os.write(log, b"."), decode_row(line))[1]
    chunk.cut = lambda passage, spans, **sizes: (os.write(log, b"."), cut(passage, spans, **sizes))[1]
    changes = [0]
    for name in CHANGES:
        setattr(os, name, _counted(getattr(os, name), changes, start.kill_before))
    if start.stage == "index":
        from data_prep.passages.index import build_index

        build_index(start.config)
    elif start.stage == "encode":
        from data_prep.vectors import encode

        write = encode._write_shard
        encode._write_shard = lambda path, vectors: (write(path, vectors), os.write(log, b"."))
        encode.encode_passages(start.config)
    else:
        {"import": questions.import_file, "chunk": chunk.chunk_passages}[start.stage](start.config)
    os.write(log, f"\n{changes[0]}".encode())


def _counted(change, changes, kill_before):
    def counted(*arguments, **options):
        changes[0] += 1
        if changes[0] == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)

    return counted
