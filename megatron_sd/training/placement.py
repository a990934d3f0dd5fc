"""Bringing a loaded model to its device without ever holding all of it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers import PreTrainedModel

from megatron_sd.config import UpdateConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.pretrained.on_demand import Stored, forget_file, stored_in
from megatron_sd.training.parallel.local_shards import full_numel

Module = TypeVar("Module", bound=nn.Module)


def place(
    module: Module, model: PreTrainedModel, settings: Mapping[str, Any], device: torch.device
) -> Module:
    """Under ZeRO-3: each parameter goes to the device alone and stays there as this rank's shard, which is
    read from its file just then where it is not in memory. Else: the whole module.

    module: what DeepSpeed will wrap, with `model` inside; settings: the configuration it will be
    initialised with. The weights must be of the dtype they shall have; deepspeed.zero.Init around their
    construction would also cast the rotary embedding's frequencies.
    """
    if "tensor_parallel" in settings:  # each rank's part goes to the device, and ZeRO cuts that there
        if settings["zero_optimization"]["stage"] == 3:
            gather_layers_whole(model)
        return module
    if settings["zero_optimization"]["stage"] < 3:
        return module.to(device)
    gather_layers_whole(model)
    # takes over torch's group; without it zero.Init sees a world of one
    deepspeed.init_distributed(auto_mpi_discovery=False)
    _ShardsFromFiles(module=module, config_dict_or_path=dict(settings))
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return module


def largest_layer(model: PreTrainedModel) -> int:
    """Elements of the largest decoder layer, which ZeRO-3 gathers whole."""
    layers = (
        module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())
    )
    return max((sum(map(full_numel, layer.parameters())) for layer in layers), default=0)


def reads_shards(update: UpdateConfig) -> bool:
    """`place` takes a policy without its weights: it shards them itself."""
    return update.zero_stage == 3 and update.tensor_parallel_size == 1


class _ShardsFromFiles(deepspeed.zero.Init):
    """ZeRO-3's sharding of a module. Of a parameter that is still in its file, this rank reads what it will
    own, no more, and nothing is broadcast."""

    def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
        for parameter in param_list:
            stored = stored_in(parameter)
            if stored is None or hasattr(parameter, "ds_id"):
                super()._convert_to_zero_parameters([parameter])
            else:
                self._read_and_shard(parameter, stored)

    def _read_and_shard(self, parameter: nn.Parameter, stored: Stored) -> None:
        # unwritten: no memory
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.local_device)
        self._convert_to_deepspeed_param(parameter)
        size = self._aligned_size(parameter) // self._partition_world_size(parameter)
        start, stop = (min(self._partition_rank(parameter) * size + n, parameter.ds_numel) for n in (0, size))
        parameter.partition()
        stored.read(parameter.ds_tensor[: stop - start], start, stop)
        forget_file(parameter)


def share_masters(optimizer: Any) -> None:
    """Under ZeRO-3 with float32 weights, let the optimiser step on the shards themselves: no second float32
    copy of them.

    DeepSpeed means to, and compares a device with its name, so it never does. optimizer: of the DeepSpeed
    engine.
    """
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", ())
    for master, shard in zip(masters, getattr(optimizer, "fp16_partitioned_groups_flat", ())):
        if shard is not None and (shard.dtype, shard.device) == (master.dtype, master.device):
            master.data = shard.data


def check_disk_offload(update: UpdateConfig) -> None:
    """Raise ConfigError for offloading to a disk where DeepSpeed cannot compile its disk operation: it
    would end in a traceback, minutes later."""
    if (
        update.offload_optimizer == "nvme"
        and not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible()
    ):
        raise ConfigError(
            "update.offload_optimizer: found nvme, and no libaio on this machine, expected its headers and"
            " library (libaio-dev, libaio-devel) for DeepSpeed to compile its disk operation: install them,"
            " or take cpu"
        )


def gather_layers_whole(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather and reduce a decoder layer at once instead of module by module: half the overhead
    of a small model.

    DeepSpeed then reduces a layer's gradients when that of its first positional argument is known. A layer
    called by keyword would be reduced too early, silently: hence the check.
    """
    for layer in set_z3_leaf_modules(model, sorted(model._no_split_modules or ()), raise_if_not_found=False):
        layer.register_forward_pre_hook(_check_positional)


@contextmanager
def zero3_linear() -> Iterator[None]:
    """Within it, linear layers do not keep the gathered weight alive for the backward, as ZeRO-3 needs.
    DeepSpeed would leave that slower linear in torch for good, and the rollout engine of this process would
    pay for it at every token."""
    plain = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


def _check_positional(layer: nn.Module, arguments: tuple) -> None:
    if not (arguments and torch.is_tensor(arguments[0])):
        raise DataError(
            f"{type(layer).__name__} gets its hidden states by keyword, which ZeRO-3's whole-layer gathering"
            " cannot follow: set update.zero_stage to 2 for this model"
        )
