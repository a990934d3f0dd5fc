"""Training on this machine: one process, or several ranks through DeepSpeed's own launcher."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sd.config import load
from megatron_sd.distributed.control import STOPPED_EXIT_CODE
from megatron_sd.errors import ConfigError, MegatronSdError


def main(argv: Sequence[str]) -> None:
    """`sd-search train`: check the configuration here, then start the ranks. Raises what the ranks' failure means."""
    num_ranks, rest = split_num_ranks(argv)
    load(rest)  # a typo ends here, once, before any process starts
    start_ranks(num_ranks, rest)


def split_num_ranks(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The value of --num-ranks (1 without it) and the other arguments. Raises ConfigError when it is no whole number above 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num-ranks", "--num_ranks", nargs="?", default="1")
    known, rest = parser.parse_known_args(list(argv))
    found = known.num_ranks or "nothing"
    if not found.isdecimal() or int(found) < 1:
        raise ConfigError(f"--num-ranks: found {found!r}, expected the number of ranks on this machine, 1 or more")
    return int(found), rest


def start_ranks(num_ranks: int, argv: Sequence[str]) -> None:
    """Run `megatron_sd.train` on `num_ranks` ranks of this machine and wait. Raises MegatronSdError when a rank fails, and
    SystemExit(85) when the run has saved and stopped as it was asked to.

    The cores are shared out among the ranks, unless OMP_NUM_THREADS is set already.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_ranks))
    choose_accelerator()
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command_line(num_ranks, free_port(), argv), env=environment, check=False)
    if finished.returncode == STOPPED_EXIT_CODE:
        raise SystemExit(STOPPED_EXIT_CODE)
    if finished.returncode != 0:
        raise MegatronSdError(f"training ended with exit code {finished.returncode}; the ranks' own message stands above")


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported anywhere, when this machine has no GPU; or it warns that it had to guess."""
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def command_line(num_ranks: int, port: int, argv: Sequence[str]) -> list[str]:
    """The process to start: python itself for one rank, DeepSpeed's launcher for more."""
    if num_ranks == 1:
        return [sys.executable, "-m", "megatron_sd.train", *argv]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", str(port)]
    return [*launcher, "--log_level", "error", "--no_local_rank", "--module", "megatron_sd.train", *argv]


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
