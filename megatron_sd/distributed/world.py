"""Who am I among the ranks: the only place that reads the launcher's environment."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_sd.distributed.control import STARTER, StopRequest
from megatron_sd.errors import ConfigError
from megatron_sd.machine import process_start

# What launchers tell a rank about itself; a process that is no rank must not inherit it.
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
EXPECTED_SIZE = "MEGATRON_SD_WORLD_SIZE"  # set by `sd-search launch`: how many ranks were asked for
STARTER_CHECK_S = 1.0
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # a rank may wait this long for the slowest rank's rollouts


@dataclass
class Pulse:
    """What this rank's main thread is doing, for the watchdog. moves: grows whenever something got done."""

    moves: int = 0
    phase: str = "start"
    waits: bool = False  # for other ranks, perhaps: in a collective of ours, or in DeepSpeed

    def move(self, phase: str | None = None) -> None:
        """Something got done, or a phase begins."""
        self.phase = phase or self.phase
        self.moves += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective: this rank is not the first to blame while it lasts."""
        self.move()
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
            self.move()


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among `size` ranks, and the device it owns."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest, compare=False, repr=False)
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """The rank that writes files and speaks."""
        return self.rank == 0


def join_world(stop: StopRequest | None = None) -> World:
    """Read RANK, WORLD_SIZE, LOCAL_RANK (set by deepspeed, torchrun or srun), join the process group and
    choose the device.

    Started by plain python, without these variables, the world is this process alone; no port is opened.
    NCCL on CUDA devices, gloo on CPUs. A second call returns the same world. stop: the requests that this
    process listens for. Raises ConfigError when the environment is half set, or when there are not as many
    ranks as were asked for.
    """
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if None in found.values() and set(found.values()) != {None}:
        raise ConfigError(
            f"environment has {found}, expected both or neither: start with deepspeed, torchrun or plain"
            " python"
        )
    rank, size = int(found["RANK"] or 0), int(found["WORLD_SIZE"] or 1)
    if found["RANK"] is not None and os.environ.get(EXPECTED_SIZE, str(size)) != str(size):
        raise ConfigError(
            f"WORLD_SIZE is {size}, expected {os.environ[EXPECTED_SIZE]}, which {EXPECTED_SIZE} asks for: a"
            " launcher without a hostfile starts the ranks of one machine only; look at the attempt's"
            " hostfile"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed asks for it even in a world of one
    device = _choose_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if found["RANK"] is None:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
            )
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    _end_with_starter(os.environ.get(STARTER))
    return World(rank=rank, size=size, local_rank=local_rank, device=device, stop=stop or StopRequest())


def lone_world(device: torch.device | None = None) -> World:
    """This process without a process group; device: None is the first CUDA device, or the CPU."""
    return World(
        rank=0,
        size=1,
        local_rank=0,
        device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


def world_of_program() -> World:
    """The ranks that a launcher started, or this process without a process group."""
    return join_world() if is_launched() else lone_world()


def first_node_address() -> str | None:
    """Where the launcher says that rank 0's node is; None without a launcher."""
    return os.environ.get("MASTER_ADDR") or None


def environment_of_others() -> dict[str, str]:
    """This process's environment for one that is no rank of the run."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def is_launched() -> bool:
    """Whether a launcher made this process a rank, be it the only one."""
    return "RANK" in os.environ


def set_environment(variables: Mapping[str, str], *, replace: bool = True) -> None:
    """Variables that a library of this process will read. replace: also those that are set already."""
    os.environ.update({name: value for name, value in variables.items() if replace or name not in os.environ})


def leave_world() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def use_device(device: torch.device) -> None:
    """First in every thread that touches the device: a new thread's current CUDA device is 0, whatever its
    process chose."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def end_process(code: int) -> NoReturn:
    """Exit without tearing the interpreter down; everything of the run is on disk by now.

    A communication thread that outlives its process group may ask for the interpreter while it is being
    torn down, and then aborts the process: a finished run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_starter(starter: str | None) -> None:
    """Send this process SIGTERM when the one that started the ranks is gone, however it went. DeepSpeed's
    launchers stand between the two, and do not always hand a signal on."""
    if starter is None:
        return
    pid, start = map(int, starter.split())

    def watch() -> None:
        while process_start(pid) == start:
            time.sleep(STARTER_CHECK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="starter", daemon=True).start()


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, expected less than the {torch.cuda.device_count()} visible CUDA"
            " devices"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
