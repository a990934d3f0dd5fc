"""Encoding over several machines: each fills a directory of its own beside the output, and whoever makes the
output moves their shards into it.

OUTPUT.part-2-of-8/vectors-00002.npy, vectors-00010.npy, ...    as in OUTPUT.partial, begun from the same
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_sd.durable.resumable import Plan, begin, locked
from megatron_sd.errors import ConfigError

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
    return output.with_name(f"{output.name}.part-{number}-of-{of}")


def part_directories(output: Path) -> list[Path]:
    """Those of all parts that were begun."""
    found = output.parent.glob(f"{output.name}.part-*-of-*")
    return sorted(path for path in found if path.is_dir())


def take_shards(output: Path, partial: Path, plan: Plan) -> None:
    """Move what the parts have finished into `partial`. Raises DataError for a part that is being written, and
    for one that was begun from something else."""
    for directory in part_directories(output):
        with locked(directory):
            begin(directory, plan)
            shards = sorted(directory.glob("vectors-*.npy"))
            for shard in shards:
                shard.replace(partial / shard.name)
        log.info("%s: %d shards taken", directory, len(shards))


def remove_parts(output: Path) -> None:
    """The output is whole: what is left of its parts may go."""
    for directory in part_directories(output):
        shutil.rmtree(directory)
