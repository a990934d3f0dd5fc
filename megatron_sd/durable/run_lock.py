"""One run, one directory: what a command holds while it writes below a directory, so that a second one is
refused by name.

    lock.json    who holds it, and a count that grows while the holder lives

A holder that was killed leaves its file. On its own machine it is known by its process; on another one,
which shares the file system, by its count: a stale lock's stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_sd.errors import ConfigError
from megatron_sd.machine import process_start

LOCK_NAME = "lock.json"
BEAT_S = 5.0
STALE_S = 60.0  # a holder on another machine whose count has stood still for so long is gone

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds a directory. machine: where its pid means something; born: the process's start,
    in clock ticks."""

    token: str
    host: str
    machine: str
    pid: int
    born: int
    since: str
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether this process could see it alive."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Of one that is here: whether its process is, and is not another one of the same number."""
        return process_start(self.pid) == self.born


@contextlib.contextmanager
def hold(directory: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> Iterator[None]:
    """Hold `directory`, made where it is missing, while the block runs. Beats come every `beat_s` seconds;
    a lock of another machine counts as stale after `stale_s` seconds without one, which are waited for.

    Raises ConfigError when another process holds it, and when it is no directory. A holder that finds its
    lock taken over (it stood still for long, suspended perhaps) ends its process: two must never write.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"found a file at {directory}, expected a directory of this run, or a new one")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    _refuse_while_held(path, stale_s=stale_s)
    mine = _this_process()
    _write(path, mine)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, over, beat_s), name="run lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        found = read_holder(path)
        if found is not None and found.token == mine.token:
            path.unlink(missing_ok=True)


def refuse_held(directory: Path) -> None:
    """Raise ConfigError when a living process of this machine holds `directory`; a look that takes no
    time."""
    found = read_holder(directory / LOCK_NAME)
    if found is not None and found.is_here and found.is_alive:
        raise ConfigError(_in_use(directory, found))


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock, or held it when it was killed; None without a readable one."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    return None


def _refuse_while_held(path: Path, *, stale_s: float) -> None:
    """Return once nobody alive holds the lock; raise as soon as somebody is seen to."""
    refuse_held(path.parent)
    found = seen = read_holder(path)
    if found is None or found.is_here:
        return
    logger.info("%s: locked by %s; waiting up to %.0f s for a sign of life", path, found, stale_s)
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, stale_s / 10))
        found = read_holder(path)
        if found is None:
            return
        if found != seen:
            raise ConfigError(_in_use(path.parent, found))
    logger.warning("%s: %s gave no sign of life for %.0f s; its lock is taken over", path, seen, stale_s)


def _in_use(directory: Path, found: Holder) -> str:
    return (
        f"{directory} is in use by {found}; expected a directory that nothing else writes to: wait for it,"
        " end it, or give another directory"
    )


def _beat(path: Path, mine: Holder, over: threading.Event, beat_s: float) -> None:
    """Count on, until the block is over."""
    beats, told = 0, False
    while not over.wait(beat_s):
        found = read_holder(path)
        if found is not None and found.token != mine.token:
            print(
                f"{path}: taken over by {found}; this process ends, so that two do not write",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        beats += 1
        try:
            _write(path, dataclasses.replace(mine, beats=beats))
        except OSError as error:
            if not told:
                logger.warning(
                    "%s: no sign of life can be written (%s); another run may take the directory over",
                    path,
                    error,
                )
            told = True


def _write(path: Path, holder: Holder) -> None:
    temporary = path.with_name(f"{path.name}.{holder.token}")
    temporary.write_text(json.dumps(dataclasses.asdict(holder)) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _this_process() -> Holder:
    pid = os.getpid()
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    born = process_start(pid) or 0
    return Holder(
        token=uuid.uuid4().hex, host=socket.gethostname(), machine=_machine(), pid=pid, born=born, since=since
    )


def _machine() -> str:
    """The booted machine and the namespace of its process numbers: containers of one host count apart."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
