"""The model that training starts from: the policy, and frozen copies of it beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from megatron_sd.config import ModelConfig, UpdateConfig
from megatron_sd.config.run import layout_of
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.pretrained.loading import check_head, load_causal_lm, load_config
from megatron_sd.training.parallel.sequence import split_sequences
from megatron_sd.training.placement import place
from megatron_sd.training.varlen_attention import check_layout  # registers model.attention varlen, too


@dataclass(frozen=True, kw_only=True)
class StartPolicy:
    """Where the start policy is, and how it will lie on the ranks. A resumed run must still find it there
    when the reference or the teacher needs it."""

    model: ModelConfig
    update: UpdateConfig
    parallel: Parallel

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a shard of every parameter (ZeRO stage 3), frozen copies included."""
        return self.update.zero_stage == 3

    def load(self, *, on_demand: bool) -> PreTrainedModel:
        """The model, ready for training, whose backbone computes this rank's slice of the sequences.
        on_demand: its weights stay in their files where possible, and placement.place reads them.
        Collective. Raises DataError when it cannot be used, ConfigError when its attention, or how its
        sequences shall be read, cannot."""
        check_layout(load_config(self.model.path), layout_of(self.model, self.update))
        model = load_for_training(self.model, on_demand=on_demand)
        return split_sequences(model, self.update, self.parallel.sequence)

    def freeze(self, module: nn.Module, model: PreTrainedModel, settings: Mapping[str, Any]) -> nn.Module:
        """A module around `model` that is not trained: sharded by a DeepSpeed engine of its own where the
        policy is, else whole on every rank. settings: the engine's. Collective."""
        module, device = module.requires_grad_(False).eval(), self.parallel.world.device
        if not self.is_sharded:
            return module.to(device)
        engine, *_ = deepspeed.initialize(model=place(module, model, settings, device), config=dict(settings))
        return engine


def load_for_training(config: ModelConfig, *, on_demand: bool = False) -> PreTrainedModel:
    """The model of a local directory, ready for training: dropout off, no cache. on_demand: without its
    weights where possible, which placement.place then reads. Raises DataError when it cannot be used,
    ConfigError when its attention cannot."""
    model_config = load_config(config.path)
    check_head(model_config, config.path)
    for name in vars(model_config):
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(model_config, name, 0.0)
    model = load_causal_lm(
        config.path,
        dtype=getattr(torch, config.dtype),
        attention=config.attention,
        config=model_config,
        on_demand=on_demand,
    ).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
