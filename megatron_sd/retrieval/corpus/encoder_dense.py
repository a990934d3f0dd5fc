"""Dense layers that stand behind the pooling of a sentence-transformers encoder (`2_Dense`): a linear map
and a function."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_sd.errors import DataError
from megatron_sd.pretrained.directory import read_object

ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"


def read_dense(directory: Path) -> nn.Sequential:
    """The layer of a module's directory, in float32. Raises DataError that names the file and what is wrong
    with it."""
    config_path = directory / "config.json"
    config = read_object(config_path, "encoder")
    sizes = [config.get(name) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise DataError(
            f"{config_path}: found {config}, expected in_features and out_features: copy the encoder again"
        )
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        found = config["module_input_name"]
        raise DataError(
            f"{config_path}: the layer reads {found!r}, expected 'sentence_embedding': one vector a text"
        )
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise DataError(
            f"{config_path}: found the activation_function {name!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    linear = nn.Linear(*sizes, bias=bool(config.get("bias", True)))
    weights, path = _read_weights(directory)
    expected = {f"linear.{key}": tuple(value.shape) for key, value in linear.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if found != expected:
        raise DataError(
            f"{path} holds {found}, expected {expected} by {config_path.name}: copy the encoder again"
        )
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return nn.Sequential(linear, ACTIVATIONS[name]()).eval()


def copy_dense(directory: Path, target: Path) -> None:
    """The layer's files, its weights as safetensors whatever they were: no pickle goes into a sealed
    directory."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(
        {name: value.contiguous() for name, value in _read_weights(directory)[0].items()}, target / _WEIGHTS
    )


def _read_weights(directory: Path) -> tuple[dict[str, torch.Tensor], Path]:
    path = next((directory / name for name in (_WEIGHTS, _PICKLED) if (directory / name).is_file()), None)
    if path is None:
        raise DataError(
            f"{directory} holds no {_WEIGHTS} and no {_PICKLED}, which modules.json asks for: copy the"
            " encoder again"
        )
    try:
        if path.name == _WEIGHTS:
            return load_file(path), path
        # tensors alone: no code of it runs
        return torch.load(path, map_location="cpu", weights_only=True), path
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path} cannot be read ({reason}); expected tensors alone: copy the encoder again"
        ) from error
