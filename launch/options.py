"""A command line that belongs to two records: a program's own options, and those of the training run it is
about."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


def split_options(
    argv: Sequence[str],
    record: type,
    renamed: Mapping[str, str] = {},  # noqa: B006 (it is only read)
) -> tuple[list[str], list[str]]:
    """The words of `record`'s options, `--help` among them, and the others. renamed: further options of the
    record's, and what they become. A `-` in the name of one of its options becomes `_`.

    >>> from launch.cluster.layout import LayoutConfig >>> split_options(["--layout=a.yaml", "--dry-run",
    "--nodes", "2", "--num_steps", "9"], LayoutConfig, {"layout": "config"}) (['--config=a.yaml',
    '--dry_run', '--nodes', '2'], ['--num_steps', '9'])
    """
    names = {field.name: field.name for field in dataclasses.fields(record)} | dict(renamed)
    own: list[str] = []
    rest: list[str] = []
    target = rest
    for word in argv:
        if word in ("-h", "--help"):
            own.append(word)
            continue
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            name = option.removeprefix("--").replace("-", "_")
            target = own if name in names else rest
            word = f"--{names[name]}{equals}{value}" if target is own else word
        target.append(word)
    return own, rest
