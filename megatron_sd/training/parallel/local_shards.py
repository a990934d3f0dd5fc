"""What this rank owns of every parameter, flat, without gathering anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from megatron_sd.errors import ReshardError
from megatron_sd.resharding.layout import ShardLayout, TensorSpec
from megatron_sd.training.lora import FullAdapter

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def shard_layout(parameters: NamedParameters, *, world_size: int, dtype: str) -> ShardLayout:
    """Who owns what of the policy's parameters, published as `dtype`. Below ZeRO-3 every rank has all of
    them, and gives out the part that would be its own."""
    specs = (
        TensorSpec(name=name, shape=full_shape(parameter), dtype=dtype) for name, parameter in parameters
    )
    return ShardLayout(parameters=tuple(specs), world_size=world_size)


class LocalShards(Mapping[str, Tensor]):
    """This rank's part of every parameter by Hugging Face name: flat views of valid elements, where they
    are just now (DeepSpeed moves them when it offloads). ZeRO-3 pads the last ranks' parts with memory that
    nobody wrote; that is left out.

    master: read the optimiser's float32 weights (ZeRO-3 only) instead of the parameters. adapters: whole,
    by the weight's name; what they add to this rank's elements is added on the way.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        layout: ShardLayout,
        *,
        rank: int,
        master: bool = False,
        adapters: Mapping[str, FullAdapter] | None = None,
    ):
        self._adapters = adapters or {}
        self._parameters = dict(parameters)
        self._layout = layout
        self._rank = rank
        self._master = master

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        start, stop = self._layout.owned(full_numel(parameter), self._rank)
        own = self._own(name, parameter, (start, stop))
        if name not in self._adapters or start == stop:
            return own
        return (own.float() + self._adapters[name].elements(start, stop)).to(own.dtype)

    def _own(self, name: str, parameter: nn.Parameter, owned: tuple[int, int]) -> Tensor:
        start, stop = owned
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach().view(-1)[start:stop]
        shard = self._master_shard(name, parameter) if self._master else parameter.ds_tensor.detach()
        if shard.numel() < stop - start:
            raise ReshardError(
                f"{name}: found {shard.numel()} elements on rank {self._rank}, expected {stop - start}:"
                " parameters on NVMe, and shards over other groups than all ranks, cannot be published;"
                " offload to host memory at most"
            )
        return shard.view(-1)[: stop - start]

    def _master_shard(self, name: str, parameter: nn.Parameter) -> Tensor:
        shard = safe_get_local_fp32_param(parameter)
        if shard is None:
            raise ReshardError(
                f"{name} has no float32 master, expected a trained parameter: set publish.source to"
                " parameters"
            )
        return shard

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter; its own shape is empty while ZeRO-3 holds it in shards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; its own numel() is 0 while ZeRO-3 holds it in shards."""
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_shard(parameter: nn.Parameter) -> Tensor:
    """The whole parameter of a rank that ZeRO-3 leaves alone, as a view of its one shard."""
    return parameter.ds_tensor.detach().view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
