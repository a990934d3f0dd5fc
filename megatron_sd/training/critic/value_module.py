"""The critic as DeepSpeed wraps it: a language model's backbone, and a head of one number in the place of its
output embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.policy_module import hidden_rows


class ValueHead(nn.Module):
    """hidden [R, H] -> values [R] float32. It starts at 0, so an untrained critic expects nothing and all
    ranks start alike."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """In float32, whatever the model's dtype: a value in bfloat16 would have three digits."""
        return (hidden.float() * self.weight.float()).sum(-1) + self.bias.float()


class ValueModule(nn.Module):
    """A causal language model whose forward says what a rollout may still earn from a row's token on."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = with_value_head(model)

    def forward(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[R] float32. The value of the token at p is read at p - 1, where its logits would be."""
        m = microbatch
        hidden = hidden_rows(self.model, m.input_ids, m.row_index, m.runs)
        return self.model.get_output_embeddings()(hidden)


def with_value_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a ValueHead in the place of its output embedding, whose weights are dropped where the
    input embedding does not share them."""
    replaced = model.get_output_embeddings().weight
    model.set_output_embeddings(ValueHead(replaced.shape[1], replaced.dtype))
    return model
