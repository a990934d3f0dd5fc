"""Joins the world, writes its process id into DIR/rank_N, and waits until somebody ends it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megatron_sd.distributed.world import join_world

if __name__ == "__main__":
    world = join_world()
    (Path(sys.argv[1]) / f"rank_{world.rank}").write_text(str(os.getpid()))
    time.sleep(600)
