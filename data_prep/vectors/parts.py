"""Encoding over several machines: each fills a directory of its own beside the output, and whoever makes the
output takes their shards.

OUTPUT.parts/2-of-8/vectors-00002.npy, vectors-00010.npy, ...    as in OUTPUT.partial, begun from the same
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_sd.durable.files import whole_file
from megatron_sd.durable.resumable import PLAN_NAME, Plan, begin, locked
from megatron_sd.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def check_part(part: tuple[int, int]) -> None:
    """Raises ConfigError for one that is none."""
    number, of = part
    if not 0 <= number < of:
        raise ConfigError(
            f"part: found [{number}, {of}], expected a number from 0 to one less than how many there are,"
            " and how many: [0, 8] to [7, 8]"
        )


def part_directory(output: Path, part: tuple[int, int]) -> Path:
    """Where a part's shards lie."""
    number, of = part
    return _parts(output) / f"{number}-of-{of}"


def take_shards(output: Path, partial: Path, plan: Plan) -> None:
    """Have what the parts have finished in `partial`, too; a part that is begun again still has it. Raises
    DataError for a part that is being written, and for one that was begun from something else."""
    for directory in _begun(output):
        with locked(directory):
            begin(directory, plan)
            shards = sorted(directory.glob("vectors-*.npy"))
            for shard in shards:
                _link(shard, partial / shard.name)
        log.info("%s: %d shards taken", directory, len(shards))


def remove_parts(output: Path) -> None:
    """The output is whole: its parts may go, but for one that is being written."""
    for directory in _begun(output):
        try:
            with locked(directory):
                shutil.rmtree(directory.resolve())
                if directory.is_symlink():
                    directory.unlink()
        except DataError as error:
            log.warning("%s; %s is whole without it, and it may go when it has ended", error, output)
    with contextlib.suppress(OSError):  # something else lies there
        _parts(output).rmdir()


def _parts(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _begun(output: Path) -> Iterator[Path]:
    """The parts that were begun; what else lies there is somebody else's."""
    parts = _parts(output)
    for path in sorted(parts.iterdir()) if parts.is_dir() else ():
        if re.fullmatch(r"\d+-of-\d+", path.name) and (path / PLAN_NAME).is_file():
            yield path


def _link(shard: Path, target: Path) -> None:
    """The same bytes under another name, whole or not at all."""
    if target.exists():
        return
    try:
        os.link(shard, target)
    except OSError:  # another disk, or one without such links
        with whole_file(target, writer=str(os.getpid())) as building:
            shutil.copyfile(shard, building)
