"""The door of training: `python -m megatron_sd.train --config FILE.yaml`, on one rank or under a launcher."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from megatron_sd.config import load
from megatron_sd.distributed.world import end_process, join_world, leave_world
from megatron_sd.errors import ConfigError, MegatronSdError


def main(argv: Sequence[str]) -> int:
    """Train one run; an error of ours, or of a disk, ends in one line on stderr, exit code 2 for a configuration error
    and 1 otherwise."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        config = load(argv)
        world = join_world()
        from megatron_sd.build import build_trainer  # imports DeepSpeed, which must see the device that join_world chose

        build_trainer(config, world).train()
    except MegatronSdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:  # of a disk: the checkpoints' own writes raise CheckpointError
        print(f"{error}: expected to read or write there; make room, or change the path, and resume", file=sys.stderr, flush=True)
        return 1
    leave_world()
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
