"""The door of training: `python -m megatron_sd.train --config FILE.yaml`, on one rank or under a launcher."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sd.distributed.control import STOPPED_EXIT_CODE, StopRequest
from megatron_sd.door import exit_code_of
from megatron_sd.errors import StopRequested

if TYPE_CHECKING:
    from megatron_sd.config import Config
    from megatron_sd.distributed.world import World


def main(argv: Sequence[str]) -> int:
    """Train one run. An error of ours, or of a disk, ends in one line on stderr: exit code 2 for a configuration error and 1
    otherwise. A run that saved because it was asked to stop ends with 85: the same command goes on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    stop = StopRequest.listen()  # before anything that takes its time
    return exit_code_of(lambda: _train(argv, stop))


def _train(argv: Sequence[str], stop: StopRequest) -> int:
    from megatron_sd.config import load

    config = load(argv)
    stop.watch(Path(config.run_dir), config.safety.stop_after_s)
    from megatron_sd.distributed.collectives import hold_together
    from megatron_sd.distributed.world import join_world, leave_world

    world = join_world(stop)
    with hold_together(world, Path(config.run_dir)):
        code = _train_alone(config, world)
    if code == 0:
        leave_world()
    return code


def _train_alone(config: Config, world: World) -> int:
    """Train in a run directory that nothing else writes to; the exit code."""
    from megatron_sd.build import build_trainer, build_watchdog  # imports DeepSpeed, which must see join_world's device
    from megatron_sd.distributed.collectives import gather_objects

    trainer, watchdog = build_trainer(config, world), build_watchdog(config, world)
    watchdog.start()
    try:
        trainer.train()
    except StopRequested as request:
        if world.is_first:
            world.stop.served()
            print(f"stopped: {request}; saved step {trainer.step}", file=sys.stderr, flush=True)
        gather_objects(world, None)  # a launcher ends the ranks that are left as soon as one has ended
        return STOPPED_EXIT_CODE
    finally:
        watchdog.stop()
    return 0


if __name__ == "__main__":
    from megatron_sd.distributed.world import end_process

    end_process(main(sys.argv[1:]))
