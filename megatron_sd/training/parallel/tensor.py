"""Tensor parallelism (DeepSpeed's AutoTP): the ranks of a group read the same microbatch, each with its
part of every layer.

A layer's first matrices are cut by outputs and its last ones by inputs, so that attention heads and the
MLP's inner units are dealt to the ranks. Embeddings and norms are whole on every rank; in the head each
rank computes its columns of the logits, and the losses are put together from a few numbers a row
(ops/head/vocab_parallel.py). ZeRO shards each rank's part over the groups.

A cut parameter knows its cut, so that whoever hands whole weights out (publisher.py, the checkpoint's
model) joins the parts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.config import UpdateConfig
from megatron_sd.config.checks import check_layer_cuts
from megatron_sd.distributed.collectives import gather_tensors
from megatron_sd.distributed.groups import RankGroup
from megatron_sd.errors import ConfigError
from megatron_sd.ops.head.vocab_parallel import VocabShard

KEY = "update.tensor_parallel_size"
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")
OF_OWN_HEADS = ("q_norm", "k_norm")  # whole on every rank, which sees the gradient of its own heads only
_ATTRIBUTE = "tensor_parallel_cut"


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """A parameter is this rank's part of a tensor that was cut along `dimension`, equally."""

    dimension: int
    group: RankGroup


def autotp_settings(size: int) -> dict[str, Any]:
    """What DeepSpeed's configuration needs, with the cuts above spelled out, not guessed; nothing for a
    rank that is alone."""
    if size == 1:
        return {}
    specs = [
        {"patterns": [_pattern(BY_OUTPUTS)], "partition_type": "column"},
        {"patterns": [_pattern(BY_INPUTS)], "partition_type": "row"},
        {"patterns": [_pattern(OF_OWN_HEADS)], "partition_type": "skip", "grad_allreduce": True},
    ]
    section = {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    # DeepSpeed counts ranks both with and without the groups
    return {"tensor_parallel": section, "train_batch_size": None}


def head_shard(group: RankGroup, vocabulary: int) -> VocabShard | None:
    """This rank's columns of the logits; None where it is alone."""
    if group.size == 1:
        return None
    width = -(-vocabulary // group.size)
    start = min(group.rank * width, vocabulary)
    gather = functools.partial(gather_tensors, group=group.processes)
    return VocabShard(start=start, num_real=min(width, vocabulary - start), width=width, gather=gather)


def check_model(model: PreTrainedModel, update: UpdateConfig) -> None:
    """Raise ConfigError for a model whose layers are not the known ones, or cannot be cut into so many
    equal parts."""
    size = update.tensor_parallel_size
    if size == 1:
        return
    layers = {
        name.rpartition(".")[2]
        for name, child in model.base_model.named_modules()
        if isinstance(child, nn.Linear)
    }
    if unknown := sorted(layers - {*BY_OUTPUTS, *BY_INPUTS}):
        raise ConfigError(
            f"{KEY}: found {size} for a model with layers {unknown}, expected {[*BY_OUTPUTS, *BY_INPUTS]}"
            " alone"
        )
    check_layer_cuts(update, model.config.to_dict())


def mark_cuts(engine: deepspeed.DeepSpeedEngine, model: PreTrainedModel, group: RankGroup) -> None:
    """Tell each parameter that the engine has cut what it is a part of."""
    if group.size == 1:
        return
    # it compares the first call's arguments over ranks, and cannot compare records
    engine.first_dataloader_check.remove()
    for name, parameter in model.named_parameters():
        *_, layer, kind = name.split(".")
        if layer in BY_OUTPUTS or (layer in BY_INPUTS and kind == "weight"):
            setattr(parameter, _ATTRIBUTE, LayerCut(dimension=0 if layer in BY_OUTPUTS else 1, group=group))


def counts_here(parameter: nn.Parameter, group: RankGroup) -> bool:
    """Sums over all ranks count this rank's elements of the parameter: of a cut one, and on one rank of one
    that all have."""
    return hasattr(parameter, _ATTRIBUTE) or group.rank == 0


def joined(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The whole tensor of which `value`, the parameter's, is a part; itself where nothing was cut.
    Collective in the group."""
    cut: LayerCut | None = getattr(parameter, _ATTRIBUTE, None)
    if cut is None:
        return value
    parts = gather_tensors(value, cut.group.processes)
    return parts.movedim(0, cut.dimension).flatten(cut.dimension, cut.dimension + 1)


def _pattern(layers: tuple[str, ...]) -> str:
    return rf".*\.({'|'.join(layers)})\.weight$"
