"""Directories on their way: filled under another name, and gone on with after a kill if they were begun
from the same.

OUTPUT.partial/*           what is being made; renamed to OUTPUT when it is whole
OUTPUT.partial/plan.json   what it is made from: everything that shapes its bytes
OUTPUT.partial.lock        held by the program that writes it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sd.durable.files import flush, write_whole
from megatron_sd.errors import ConfigError, DataError

PLAN_NAME = "plan.json"
_MAX_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """begun_from: everything that shapes the bytes, as JSON values. finished: glob patterns of what is not
    to be done again."""

    begun_from: Mapping[str, Any]
    finished: tuple[str, ...]


@contextlib.contextmanager
def new_directory(output: Path, plan: Plan | None = None) -> Iterator[Path]:
    """A directory to fill that gets the name `output` only when the block ends well.

    With a plan it comes as a killed program left it; bad input (DataError, ConfigError) still leaves
    nothing, but an interrupt or a full disk leaves what is finished. Without one nothing ever stays. Raises
    DataError when `output` exists, when another program is writing it, or when it was begun from something
    else.
    """
    check_absent(output)
    partial = partial_of(output)
    with locked(partial):
        begin(partial, plan)
        try:
            yield partial
        except BaseException as error:
            if plan is None or isinstance(error, DataError | ConfigError):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / PLAN_NAME).unlink(missing_ok=True)
        partial.rename(output)


def check_absent(output: Path) -> None:
    """Raise DataError when `output` exists."""
    if output.exists():
        raise DataError(f"{output} exists: remove it or choose another output; it is never changed in place")


def partial_of(output: Path) -> Path:
    """Where a directory is filled."""
    return output.with_name(output.name + ".partial")


@contextlib.contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Two programs must not write one directory. Raises DataError while another one does."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    path = partial.with_name(partial.name + ".lock")
    taken = f"{partial} is being written by another process: wait for it, or choose another output"
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(taken) from error
        if not path.exists() or not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            raise DataError(taken)  # it ended in between, and took the lock's name with it
        try:
            yield
        finally:
            path.unlink()


def begin(partial: Path, plan: Plan | None) -> None:
    """Make the directory anew, or leave it as it is when some of this very plan is finished.

    Raises DataError that says what differs when some of another plan is finished.
    """
    path = partial / PLAN_NAME
    if plan is None or not path.exists() or not any(any(partial.glob(pattern)) for pattern in plan.finished):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if plan is not None:
            write_whole(path, json.dumps(plan.begun_from, indent=1, sort_keys=True))
        return
    try:
        begun = _flat(json.loads(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"{path} is corrupt ({error}): remove {partial} and start again") from error
    wanted = _flat(json.loads(json.dumps(plan.begun_from)))
    differing = sorted(name for name in begun.keys() | wanted.keys() if begun.get(name) != wanted.get(name))
    if differing:
        shown = [
            f"{name} was {begun.get(name)!r} and is {wanted.get(name)!r}" for name in differing[:_MAX_SHOWN]
        ]
        more = f", and {len(differing) - _MAX_SHOWN} more" if len(differing) > _MAX_SHOWN else ""
        raise DataError(
            f"{partial} was begun from something else: {', '.join(shown)}{more}; use what it was begun from,"
            " or remove it to start anew"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: leaf
        for key, own in value.items()
        for path, leaf in _flat(own, f"{name}.{key}" if name else key).items()
    }


@contextlib.contextmanager
def whole_part(directory: Path, name: str) -> Iterator[Path]:
    """A folder in which to make the folder `name`; that appears in `directory` when it is whole and on the
    disk."""
    building = directory / f".{name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    yield building
    flush(path for path in building.rglob("*") if path.is_file())
    os.rename(building / name, directory / name)
    building.rmdir()
