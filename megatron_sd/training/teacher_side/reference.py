"""The frozen start policy: log-probabilities for the KL term."""

from __future__ import annotations

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.config import Config
from megatron_sd.distributed.world import World
from megatron_sd.ops.head.types import HeadOptions
from megatron_sd.training.deepspeed_config import reference_config
from megatron_sd.training.parallel.sequence import split_sequences
from megatron_sd.training.placement import place
from megatron_sd.training.policy_module import (
    DeviceMicrobatch,
    load_for_training,
    student_values,
    with_row_head,
)


class ReferenceModule(nn.Module):
    """A frozen causal language model whose forward returns log-probabilities."""

    def __init__(self, model: PreTrainedModel, options: HeadOptions):
        super().__init__()
        self.model = with_row_head(model, options).requires_grad_(False)

    def forward(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[R] log-probabilities of the microbatch's completion tokens."""
        return student_values(self.model, microbatch, None, None).logprobs


class ReferencePolicy:
    """The start policy, sharded by a DeepSpeed engine of its own when the policy is (stage 3), else whole
    on every rank."""

    def __init__(self, module: nn.Module):
        self._module = module

    @classmethod
    def load(cls, config: Config, world: World, options: HeadOptions) -> ReferencePolicy:
        """From config.model.path: a resumed run must still find the start policy there."""
        model = load_for_training(config.model, on_demand=config.update.zero_stage == 3)
        module = ReferenceModule(split_sequences(model, config.update, world), options).eval()
        if config.update.zero_stage < 3:
            return cls(module.to(world.device))
        settings = reference_config(config, world.size)
        engine, *_ = deepspeed.initialize(
            model=place(module, module.model, settings, world.device), config=settings
        )
        return cls(engine)

    @torch.no_grad()
    def logprobs(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[R] float32 log-probabilities of the microbatch's completion tokens under the start policy."""
        return self._module(microbatch=microbatch)
