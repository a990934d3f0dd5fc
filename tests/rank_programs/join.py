"""Ranks that join and say what was wrong: the world of a launcher, and the doctor's meeting of nodes."""

import torch.distributed as dist

from launch.doctor import checks
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import ConfigError, MegatronSdError


def run(_: None) -> int:
    """3 when the world is refused."""
    try:
        join_world()
    except ConfigError as error:
        print(error)
        return 3
    dist.barrier()  # or rank 0 could end, and its store with it, while another is still joining
    return 0


def doctor(argv: list[str]) -> int:
    """`python -m launch.doctor.checks`."""
    try:
        checks.main(argv)
    except MegatronSdError as error:
        print(f"doctor: {error}")
        return 1
    return 0
