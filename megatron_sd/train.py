"""The door of training: `python -m megatron_sd.train --config FILE.yaml`, on one rank or under a launcher."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sd.distributed.control import StopRequest
from megatron_sd.door import STOPPED_EXIT_CODE, exit_code_of
from megatron_sd.errors import StopRequested

if TYPE_CHECKING:
    from megatron_sd.config import Config
    from megatron_sd.distributed.world import World
    from megatron_sd.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Train one run. An error of ours, or of a disk, ends in one line on stderr: exit code 2 for a
    configuration error and 1 otherwise. A run that saved because it was asked to stop ends with 85: the
    same command goes on."""
    return run_door(lambda stop: _train(argv, stop))


def run_door(train: Callable[[StopRequest], int]) -> int:
    """The exit code of a training program, which is told of requests to stop."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    stop = StopRequest.listen()  # before anything that takes its time
    return exit_code_of(lambda: train(stop))


def _train(argv: Sequence[str], stop: StopRequest) -> int:
    from megatron_sd.config.load import load

    def build(config: Config, world: World) -> Trainer:
        # here, because it imports DeepSpeed, which must see join_world's device
        from megatron_sd.building.trainer import build_trainer

        return build_trainer(config, world)

    return train_run(load(argv), stop, build)


def train_run(config: Config, stop: StopRequest, build: Callable[[Config, World], Trainer]) -> int:
    """Join the ranks, build and train; the exit code. Raises ConfigError for what is not settled."""
    config.update.check_settled()
    stop.watch(Path(config.run_dir), config.safety.stop_after_s)
    from megatron_sd.distributed.collectives import hold_together
    from megatron_sd.distributed.world import join_world, leave_world

    world = join_world(stop)
    with hold_together(world, Path(config.run_dir)):
        code = _train_alone(config, world, build)
    if code == 0:
        leave_world()
    return code


def _train_alone(config: Config, world: World, build: Callable[[Config, World], Trainer]) -> int:
    """Train in a run directory that nothing else writes to; the exit code."""
    trainer = build(config, world)
    if world.is_first:  # where anybody may put STOP
        (Path(config.run_dir) / "control").mkdir(parents=True, exist_ok=True)
    from megatron_sd.building.trainer import build_watchdog
    from megatron_sd.distributed.collectives import gather_objects

    watchdog = build_watchdog(config, world)
    watchdog.start()
    try:
        trainer.train()
    except StopRequested as request:
        if world.is_first:
            world.stop.served()
            print(f"stopped: {request}; saved step {trainer.step}", file=sys.stderr, flush=True)
            trainer.recorder.close()  # services hear that this start is over
        gather_objects(world, None)  # a launcher ends the ranks that are left as soon as one has ended
        return STOPPED_EXIT_CODE
    finally:
        trainer.checkpoints.abandon()
        watchdog.stop()
    return 0


if __name__ == "__main__":
    from megatron_sd.distributed.world import end_process

    end_process(main(sys.argv[1:]))
