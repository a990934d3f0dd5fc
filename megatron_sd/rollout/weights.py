"""The engine's own copy of the weights, overwritten in place, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_sd.errors import RolloutError


class WeightTable:
    """Parameters of a model by Hugging Face name; tied parameters answer to each of their names.

    An update is all or nothing to the caller: `missing()` lists what no bucket has brought yet.
    """

    def __init__(self, model: torch.nn.Module):
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._written: set[int] = set()

    def begin(self) -> None:
        """Expect every parameter anew."""
        self._written = set()

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full parameters in place, converting type and device. Raises RolloutError for an unknown name, another shape,
        and two names of one tied parameter that bring different values."""
        for name, value in weights:
            parameter = self._parameters.get(name)
            if parameter is None:
                raise RolloutError(
                    f"publishing sent {name!r}, expected one of the {len(self._parameters)} parameters of the engine's model, "
                    f"such as {next(iter(self._parameters))!r}; build policy and engine from the same model directory"
                )
            if parameter.shape != value.shape:
                raise RolloutError(
                    f"publishing sent {name!r} with shape {tuple(value.shape)}, expected {tuple(parameter.shape)}: send it whole"
                )
            value = value.to(device=parameter.device, dtype=parameter.dtype)
            if id(parameter) in self._written and not torch.equal(parameter, value):
                raise RolloutError(f"publishing sent {name!r} twice or under two tied names, with different values: send one")
            parameter.copy_(value)
            self._written.add(id(parameter))

    def missing(self) -> list[str]:
        """Names of parameters that no bucket has brought since `begin`; a tied parameter counts under any of its names."""
        written = self._written
        return [name for name, parameter in self._parameters.items() if id(parameter) not in written]
