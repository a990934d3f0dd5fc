"""The frozen start policy: log-probabilities for the KL term."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.ops.head.types import HeadOptions
from megatron_sd.training.deepspeed_config import reference_config
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.placement import largest_layer
from megatron_sd.training.policy_module import student_values, with_row_head
from megatron_sd.training.start_policy import StartPolicy


class ReferenceModule(nn.Module):
    """A frozen causal language model whose forward returns log-probabilities."""

    def __init__(self, model: PreTrainedModel, options: HeadOptions):
        super().__init__()
        self.model = with_row_head(model, options)

    def forward(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[R] log-probabilities of the microbatch's completion tokens."""
        return student_values(self.model, microbatch, None, None).logprobs


class ReferencePolicy:
    """The start policy beside the trained one, to be asked for log-probabilities."""

    def __init__(self, start: StartPolicy, options: HeadOptions):
        module = ReferenceModule(start.load(on_demand=start.is_sharded), options)
        settings = reference_config(
            dtype=start.model.dtype,
            world_size=start.parallel.world.size,
            device_type=start.parallel.world.device.type,
            layer=largest_layer(module.model),
        )
        self._module = start.freeze(module, module.model, settings)

    @torch.no_grad()
    def logprobs(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[R] float32 log-probabilities of the microbatch's completion tokens under the start policy."""
        return self._module(microbatch=microbatch)
