"""Low-rank adapters (Hu et al. 2021): W stays frozen, W + alpha / rank * B A is what computes, and what is
published and saved.

A weight knows its adapter, so that whoever hands weights out (local_shards.py, publisher.py, the
checkpoint's model) merges on the way, and nobody else has to know: names and shapes stay Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.config import LoraConfig
from megatron_sd.errors import ConfigError

_ATTRIBUTE = "lora_adapter"
_NAMES = ("lora_a", "lora_b")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Of a weight [out, in]: a [rank, in], b [out, rank]; under ZeRO-3 empty outside gathered regions."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def delta(self) -> Tensor:
        """[out, in] float32: what it adds. Call it where a and b are gathered."""
        return FullAdapter(a=self.a.detach().float(), b=self.b.detach().float(), scale=self.scale).rows(
            0, self.b.shape[0]
        )


@dataclass(frozen=True, kw_only=True)
class FullAdapter:
    """Whole float32 matrices, outside any gathered region."""

    a: Tensor
    b: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, in]: these rows of what it adds."""
        return self.scale * (self.b[start:stop] @ self.a)

    def elements(self, start: int, stop: int) -> Tensor:
        """[stop - start]: these flat elements of what it adds; no other rows are computed."""
        width = self.a.shape[1]
        first = start // width
        rows = self.rows(first, -(-stop // width))
        return rows.flatten()[start - first * width : stop - first * width]


class LoraLinear(nn.Module):
    """A linear layer with an adapter; its weight and bias keep their names."""

    def __init__(self, linear: nn.Linear, config: LoraConfig, generator: torch.Generator):
        super().__init__()
        out_features, in_features = linear.weight.shape
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        bound = 1.0 / math.sqrt(in_features)
        start = torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(start.to(**like))
        self.lora_b = nn.Parameter(torch.zeros(out_features, config.rank, **like))
        self.scale = config.alpha / config.rank
        setattr(self.weight, _ATTRIBUTE, Adapter(a=self.lora_a, b=self.lora_b, scale=self.scale))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = nn.functional.linear(hidden, self.lora_a)
        return nn.functional.linear(hidden, self.weight, self.bias) + self.scale * nn.functional.linear(
            low, self.lora_b
        )


def with_adapters(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PreTrainedModel:
    """The model with everything frozen but an adapter on each linear layer named in config.targets;
    unchanged for rank 0. The start is the model itself. Raises ConfigError when no layer has such a name."""
    if config.rank == 0:
        return model
    model.requires_grad_(False)
    model.enable_input_require_grads()  # ZeRO-3 knows that a layer is done by the gradient of its input
    generator = torch.Generator().manual_seed(seed)
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in config.targets and isinstance(child, nn.Linear)
    ]
    if not places:
        raise ConfigError(
            f"model.lora.targets: found {list(config.targets)}, expected names of the model's linear layers"
        )
    for parent, name in places:
        setattr(parent, name, LoraLinear(getattr(parent, name), config, generator))
    return model


def adapter_of(parameter: nn.Parameter) -> Adapter | None:
    """What is added to a weight, if anything is."""
    return getattr(parameter, _ATTRIBUTE, None)


def is_adapter(name: str) -> bool:
    """The parameter of this name is half of an adapter."""
    return name.rpartition(".")[2] in _NAMES


def with_their_adapters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters and those of their adapters: what must be gathered to merge."""
    adapters = [(p, adapter_of(p)) for p in parameters]
    return [
        part for p, adapter in adapters for part in ((p,) if adapter is None else (p, adapter.a, adapter.b))
    ]


def merged(parameter: nn.Parameter) -> Tensor:
    """The whole weight with what its adapter adds, added in float32. Call it where both are gathered."""
    adapter = adapter_of(parameter)
    if adapter is None:
        return parameter.detach()
    return (parameter.detach().float() + adapter.delta()).to(parameter.dtype)
