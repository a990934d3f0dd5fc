import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_sd.distributed.collectives import broadcast_object, gather_objects, share, sum_floats
from megatron_sd.distributed.world import World, join_world
from megatron_sd.errors import ConfigError
from tests.nursery import nursery


def test_plain_python_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = join_world()
    assert (world.rank, world.size, world.local_rank, world.is_first) == (0, 1, 0, True)
    assert dist.is_initialized() and dist.get_world_size() == 1
    assert join_world() == world
    assert sum_floats(world, [1.5, 2.0]) == [1.5, 2.0]
    assert gather_objects(world, "x") == ["x"] and broadcast_object(world, "x") == "x"


@pytest.mark.parametrize("found", [{"RANK": "1"}, {"WORLD_SIZE": "2"}])
def test_half_an_environment_is_an_error(monkeypatch, found):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="expected both or neither"):
        join_world()


@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_partition_in_order_and_are_even(num, size):
    worlds = [World(rank=rank, size=size, local_rank=0, device=None) for rank in range(size)]
    shares = [share(world, range(num)) for world in worlds]
    assert [item for share in shares for item in share] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.ranks
def test_an_error_on_one_rank_is_raised_on_every_rank():
    """A rank that waited in a collective for one that has left would wait for hours under NCCL."""
    ranks = nursery().start("tests.rank_programs.failing_rollouts:run", None, ranks=2)
    expected = "['groups of rank 0', 'groups of rank 1']\nRolloutError: rank 1: 3 of 4 rollouts failed\n"
    ranks.succeed(60)
    assert [ranks.output_of(rank) for rank in range(2)] == [expected, expected]
