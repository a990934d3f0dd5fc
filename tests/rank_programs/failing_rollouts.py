"""Rank 1's rollouts fail; what each rank then raises."""

from megatron_sd.distributed.collectives import together
from megatron_sd.distributed.world import join_world, leave_world
from megatron_sd.errors import RolloutError


def run(_: None) -> None:
    world = join_world()

    def rollouts(failing_rank: int) -> str:
        if world.rank == failing_rank:
            raise RolloutError("3 of 4 rollouts failed")
        return f"groups of rank {world.rank}"

    print(together(world, lambda: rollouts(failing_rank=9)))
    try:
        together(world, lambda: rollouts(failing_rank=1))
    except RolloutError as error:
        print(f"RolloutError: {error}")
    leave_world()
