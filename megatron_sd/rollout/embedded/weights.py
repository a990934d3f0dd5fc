"""The engine's weights: a copy of its own, overwritten in place, bucket by bucket, or memory of the
policy's that it reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from megatron_sd.errors import RolloutError
from megatron_sd.pretrained.loading import load_causal_lm
from megatron_sd.pretrained.on_demand import forget_file


def load_model(
    path: str, *, dtype: torch.dtype, device: torch.device, attention: str = "sdpa", on_demand: bool = False
) -> PreTrainedModel:
    """A causal language model from a local directory, for an engine to own; on_demand: without its weights
    where possible, since an update brings them. Raises DataError when there is none that is whole,
    ConfigError for an attention that its family lacks."""
    return load_causal_lm(path, dtype=dtype, attention=attention, on_demand=on_demand).to(device)


class WeightTable:
    """Parameters of a model by Hugging Face name; tied parameters answer to each of their names.

    An update is all or nothing to the caller: `missing()` lists what no bucket has brought yet.
    """

    def __init__(self, model: torch.nn.Module):
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._written: set[int] = set()
        self._given_back: dict[str, torch.Size] = {}  # shapes of what has no memory

    def give_back(self) -> None:
        """Let go of every parameter's memory until `begin`. A model that goes on reading them fails."""
        if not self._given_back:
            self._given_back = {name: parameter.shape for name, parameter in self._parameters.items()}
            for parameter in self._parameters.values():
                parameter.data = parameter.data.new_empty(0)

    def begin(self) -> None:
        """Expect every parameter anew, in memory of its own."""
        self._written = set()
        given_back, self._given_back = self._given_back, {}
        for name, shape in given_back.items():
            parameter = self._parameters[name]
            if parameter.shape != shape:  # a tied one has it under another name
                parameter.data = parameter.data.new_empty(shape)

    def share(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Read full parameters where they are from now on, in the memory given. Raises RolloutError for an
        unknown name, another shape, dtype or device."""
        for name, value in weights:
            parameter = self._find(name, value)
            if (parameter.dtype, parameter.device) != (value.dtype, value.device):
                raise RolloutError(
                    f"publishing shares {name!r} in {value.dtype} on {value.device}, expected"
                    f" {parameter.dtype} on {parameter.device}: send a copy"
                )
            parameter.data = value.detach()
            forget_file(parameter)
            self._written.add(id(parameter))

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full parameters in place, converting type and device. Raises RolloutError for an unknown
        name, another shape, and two names of one tied parameter that bring different values."""
        for name, value in weights:
            parameter = self._find(name, value)
            value = value.to(device=parameter.device, dtype=parameter.dtype)
            if id(parameter) in self._written and not torch.equal(parameter, value):
                raise RolloutError(
                    f"publishing sent {name!r} twice or under two tied names, with different values: send one"
                )
            parameter.copy_(value)
            forget_file(parameter)
            self._written.add(id(parameter))

    def missing(self) -> list[str]:
        """Names of parameters that no bucket has brought since `begin`; a tied parameter counts under any
        of its names."""
        written = self._written
        return [name for name, parameter in self._parameters.items() if id(parameter) not in written]

    def _find(self, name: str, value: torch.Tensor) -> torch.nn.Parameter:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise RolloutError(
                f"publishing sent {name!r}, expected one of the {len(self._parameters)} parameters of the"
                f" engine's model, such as {next(iter(self._parameters))!r}; build policy and engine from the"
                " same model directory"
            )
        if parameter.shape != value.shape:
            raise RolloutError(
                f"publishing sent {name!r} with shape {tuple(value.shape)}, expected"
                f" {tuple(parameter.shape)}: send it whole"
            )
        return parameter
