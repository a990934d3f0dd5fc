"""A stand-in for training, for the tests of the job scripts: real ranks under DeepSpeed's launcher, a real
process group, checkpoints committed as training commits them; its steps do nothing. Told to stop by
SIGUSR1, it saves and ends with 85.

    python -m tests.slurm.stand_in --config=FILE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.cluster.attempt import newest_step
from megatron_sd.config.load import load
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import end_process, join_world
from megatron_sd.door import STOPPED_EXIT_CODE
from megatron_sd.durable import directories

STEP_S = 0.2


def main(argv: list[str]) -> int:
    told: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _frame: told.append(number))
    config, world = load(argv), join_world()
    run_dir = Path(config.run_dir)
    step = newest_step(run_dir)
    if (run_dir / "stuck").exists():
        return 3
    if world.is_first:
        Path(os.environ["ATTEMPT_DIR"], "trains").touch()
    while step < config.num_steps:
        time.sleep(STEP_S)
        step += 1
        if any(gather_objects(world, bool(told))):
            save(run_dir, step, world)
            return STOPPED_EXIT_CODE
    save(run_dir, step, world)
    return 0


def save(run_dir: Path, step: int, world) -> None:
    directory = directories.directory_of(run_dir / "checkpoints", step)
    if world.is_first:
        staging = directories.staging_of(directory)
        staging.mkdir(parents=True, exist_ok=True)
        (staging / "step").write_text(str(step))
        directories.commit(staging, directory, directories.seal(staging))
        with (run_dir / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
    gather_objects(world, None)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
