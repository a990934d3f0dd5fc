"""What a rank gives out of each parameter; parameters that look like ZeRO-3's stand in for a world of
several ranks."""

import pytest
import torch

from megatron_sd.errors import ReshardError
from megatron_sd.training.parallel.local_shards import LocalShards, full_numel, shard_layout


def zero3_parameter(values: torch.Tensor, rank: int, world_size: int) -> torch.nn.Parameter:
    """As DeepSpeed leaves it: an empty parameter and a shard whose padding is garbage."""
    part = -(-values.numel() // world_size)
    shard = torch.full((part,), 1e9)
    own = values.reshape(-1)[rank * part : (rank + 1) * part]
    shard[: len(own)] = own
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_shape, parameter.ds_numel = shard, values.shape, values.numel()
    return parameter


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_all_ranks_together_give_out_every_element_once_and_no_padding(world_size):
    values = {"w": torch.randn(3, 5), "b": torch.randn(2)}
    given = {name: [] for name in values}
    for rank in range(world_size):
        parameters = [(name, zero3_parameter(value, rank, world_size)) for name, value in values.items()]
        layout = shard_layout(parameters, world_size=world_size, dtype="float32")
        assert [(spec.name, spec.shape) for spec in layout.parameters] == [("w", (3, 5)), ("b", (2,))]
        shards = LocalShards(parameters, layout, rank=rank)
        assert list(shards) == ["w", "b"] and len(shards) == 2
        for name, shard in shards.items():
            given[name].append(shard)
    for name, value in values.items():
        assert torch.equal(torch.cat(given[name]), value.reshape(-1))


def test_whole_parameters_are_given_out_as_if_they_were_sharded():
    whole = torch.nn.Parameter(torch.randn(3, 5))
    layout = shard_layout([("w", whole)], world_size=2, dtype="float32")
    parts = [LocalShards([("w", whole)], layout, rank=rank)["w"] for rank in range(2)]
    assert [len(part) for part in parts] == [8, 7] and torch.equal(
        torch.cat(parts), whole.detach().reshape(-1)
    )


def test_a_shard_is_read_where_it_is_now():
    """Offloading gives ds_tensor other memory."""
    parameter = zero3_parameter(torch.arange(6.0), 0, 2)
    shards = LocalShards(
        [("w", parameter)], shard_layout([("w", parameter)], world_size=2, dtype="float32"), rank=0
    )
    assert shards["w"].tolist() == [0, 1, 2]
    parameter.ds_tensor.data = parameter.ds_tensor + 10
    assert shards["w"].tolist() == [10, 11, 12] and full_numel(parameter) == 6


def test_a_shard_that_is_not_in_memory_is_named():
    parameter = zero3_parameter(torch.arange(6.0), 0, 2)
    parameter.ds_tensor = torch.empty(1)
    shards = LocalShards(
        [("w", parameter)], shard_layout([("w", parameter)], world_size=2, dtype="float32"), rank=0
    )
    with pytest.raises(ReshardError, match="w: found 1 elements on rank 0, expected 3: parameters on NVMe"):
        shards["w"]
