"""Hostfiles and `.deepspeed_env`, read strictly: without a hostfile DeepSpeed trains on this machine alone,
and a blank line of `.deepspeed_env` ends it with a traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sd.errors import ConfigError

_ENTRY = re.compile(r"(\S+)\s+slots=(\d+)")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine and how many ranks it runs."""

    name: str
    num_slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file with lines `NAME slots=N`; blank lines and comments are skipped, the order is
    that of the ranks.

    Raises ConfigError for a missing or empty file, and by line number for a line of another form, a host
    named twice, or no slot.
    """
    lines = _lines(
        path,
        "a hostfile with one line `NAME slots=N` a machine (DeepSpeed would train on this machine alone)",
    )
    hosts: list[Host] = []
    for number, text in enumerate(lines, start=1):
        line = text.split("#")[0].strip()
        if not line:
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None or int(entry[2]) < 1:
            raise ConfigError(f"{path}:{number}: found {line!r}, expected `NAME slots=N` with N 1 or more")
        if entry[1] in {host.name for host in hosts}:
            raise ConfigError(
                f"{path}:{number}: found {entry[1]} a second time, expected each machine once: add its"
                " slots up"
            )
        hosts.append(Host(name=entry[1], num_slots=int(entry[2])))
    if not hosts:
        raise ConfigError(f"{path}: found no host, expected one line `NAME slots=N` a machine")
    return tuple(hosts)


def render_hostfile(hosts: Sequence[Host]) -> str:
    """The file's text, which read_hostfile reads back."""
    return "".join(f"{host.name} slots={host.num_slots}\n" for host in hosts)


def read_environment(path: Path) -> dict[str, str]:
    """The variables of a `.deepspeed_env`. Raises ConfigError for what DeepSpeed's own reader would crash
    on, by line number."""
    variables: dict[str, str] = {}
    for number, line in enumerate(_lines(path, "a file with lines `NAME=VALUE`"), start=1):
        name, separator, value = line.partition("=")
        if not separator or not _NAME.fullmatch(name):
            found = repr(line) if line.strip() else "a blank line"
            raise ConfigError(
                f"{path}:{number}: found {found}, expected `NAME=VALUE`, without blank lines and comments"
            )
        variables[name] = value
    return variables


def render_environment(variables: Mapping[str, str]) -> str:
    """The file's text, which read_environment (and DeepSpeed) reads back. Raises ConfigError for a value of
    several lines."""
    for name, value in variables.items():
        if not _NAME.fullmatch(name) or "\n" in value:
            raise ConfigError(
                f"environment variable {name!r}: found {value!r}, expected a plain name and a value of one"
                " line"
            )
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def _lines(path: Path, expected: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "a directory" if path.is_dir() else "no file" if not path.exists() else f"no text ({error})"
        raise ConfigError(f"{path}: found {reason}, expected {expected}") from error
