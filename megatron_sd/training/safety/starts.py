"""How often a run was started: `run_dir/attempts.jsonl`, one line a start, so that a run that never gets
further is given up."""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_sd.distributed.collectives import broadcast_object
from megatron_sd.distributed.world import World
from megatron_sd.errors import NoProgressError

ATTEMPTS_NAME = "attempts.jsonl"


class Attempts:
    """Lines are {"step": that the attempt began with, "ranks": int, "started": Unix time}."""

    def __init__(self, path: Path, world: World, *, limit: int):
        """limit: attempts in a row that may begin with the same step; 0: any number."""
        self._path = path
        self._world = world
        self._limit = limit

    def begin(self, step: int) -> None:
        """Note that an attempt begins with `step`. Raises NoProgressError on every rank when too many did
        before it."""
        idle = broadcast_object(self._world, self._same_step(step) if self._world.is_first else 0)
        if self._limit and idle >= self._limit:
            raise NoProgressError(
                f"the last {idle} attempts began with step {step} and committed no later checkpoint"
                f" (safety.max_idle_attempts is {self._limit}): find out why from the logs, then remove"
                f" {self._path} to try again"
            )
        if self._world.is_first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": step, "ranks": self._world.size, "started": round(time.time(), 3)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _same_step(self, step: int) -> int:
        """How many of the last attempts began with this step."""
        count = 0
        for line in reversed(
            self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        ):
            if _step(line) != step:
                break
            count += 1
        return count


def _step(line: str) -> int | None:
    """None for a line that was torn."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
