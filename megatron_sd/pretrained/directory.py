"""What a Hugging Face model directory holds, judged by its files before any framework reads them.

A directory that cannot be used is refused in one line: which file, what it is, what to do. Nothing here
imports torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sd.errors import DataError

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_LFS_HEAD = b"version https://git-lfs"
_NOT_WEIGHTS = frozenset({"adapter_model.safetensors"})


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file, by its header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # the format's own word, such as BF16
    offset: int  # bytes before its first element in the file


def read_config(directory: Path, key: str = "model.path") -> dict[str, Any]:
    """config.json of a directory whose weights could be trained or sampled from. key: what named the
    directory.

    Raises DataError for what is no model directory, for quantised weights, and for an adapter alone or
    beside the model.
    """
    path = directory / "config.json"
    if not directory.is_dir():
        raise DataError(
            f"{key}: found no directory at {directory}, expected a local Hugging Face model directory"
        )
    _refuse_adapter(directory, key)
    if not path.is_file():
        raise DataError(f"{key} {directory} holds {_instead(directory, 'no config.json')}")
    config = read_object(path, key)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise DataError(
            f"{key} {directory} holds quantised weights ({method}, by quantization_config in its"
            " config.json), which cannot be trained: give the unquantised directory"
        )
    return config


def stored_tensors(directory: Path, key: str = "model.path") -> dict[str, StoredTensor] | None:
    """Every tensor of the directory's safetensors files, by their headers; None where its weights are in
    another format.

    Raises DataError for a file that is cut short, is a Git LFS pointer or is missing, and for an index that
    does not fit.
    """
    files = sorted(path for path in directory.glob("*.safetensors") if path.name not in _NOT_WEIGHTS)
    index = directory / INDEX_NAME
    if (directory / WEIGHTS_NAME).exists():
        files = [directory / WEIGHTS_NAME]
    elif index.is_file():
        files = _indexed_files(index, files, key)
    elif files:
        raise DataError(
            f"{key} {directory} holds {files[0].name} and {len(files) - 1} more, but no {INDEX_NAME} that"
            " says which tensor lies where: copy it from where the files came from (one file alone is called"
            f" {WEIGHTS_NAME})"
        )
    if not files and not any(directory.glob("pytorch_model*.bin")):
        raise DataError(f"{key} {directory} holds {_instead(directory, 'no weights')}")
    if not files:
        return None
    tensors = {name: tensor for file in files for name, tensor in read_header(file, key).items()}
    if index.is_file() and not (directory / WEIGHTS_NAME).exists():
        _check_index(index, tensors, key)
    return tensors


def read_header(path: Path, key: str = "model.path") -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises DataError when it is none, or not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(_LFS_HEAD):
            raise DataError(
                f"{key}: {path} is a Git LFS pointer, not the weights: run `git lfs pull` in {path.parent}"
            )
        try:
            (length,) = struct.unpack("<Q", head[:8])
            file.seek(8)
            header = json.loads(file.read(length)) if length < size else None
        except (struct.error, ValueError):
            header = None
    if not isinstance(header, dict):
        raise DataError(
            f"{key}: {path} ({size} bytes) is no safetensors file, or cut short in its header: copy it again"
        )
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != whole:
        state = "cut short" if size < whole else "longer than it says"
        raise DataError(f"{key}: {path} is {state}: {size} of {whole} bytes; copy it again")
    return {
        name: StoredTensor(
            file=path,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def _indexed_files(index: Path, present: list[Path], key: str) -> list[Path]:
    content = read_object(index, key)
    if not isinstance(content.get("metadata"), dict):
        raise DataError(
            f'{key}: {index} has no "metadata", which transformers needs: copy it again, or add "metadata":'
            ' {} beside its "weight_map"'
        )
    places = content.get("weight_map", {})
    wanted = [index.parent / name for name in sorted(set(places.values()))]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise DataError(
            f"{key} {index.parent} lacks {missing[0]} ({len(missing)} of the {len(wanted)} files that"
            f" {INDEX_NAME} names): copy the rest of the model"
        )
    return sorted({*wanted, *present})


def _check_index(index: Path, tensors: Mapping[str, StoredTensor], key: str) -> None:
    """The index must name every tensor of the files: transformers reads no other."""
    places = read_object(index, key)["weight_map"]
    unnamed = sorted(tensors.keys() - places.keys())
    lost = sorted(
        name for name, file in places.items() if name not in tensors or tensors[name].file.name != file
    )
    if unnamed or lost:
        found = (
            f"does not name {unnamed[0]} of {tensors[unnamed[0]].file.name}"
            if unnamed
            else (f"says that {lost[0]} lies in {places[lost[0]]}, which does not hold it")
        )
        count = len(unnamed) + len(lost)
        raise DataError(
            f"{key}: {index} {found} ({count} tensors in all do not fit): copy index and weights from one"
            " source"
        )


def _refuse_adapter(directory: Path, key: str) -> None:
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    base = read_object(path, key).get("base_model_name_or_path", "its base model")
    if (directory / "config.json").is_file():
        raise DataError(
            f"{key} {directory} holds a model and beside it an adapter ({path.name} of {base}), which would"
            " be left out: merge the adapter into the model, or move its files elsewhere"
        )
    raise DataError(
        f"{key} {directory} holds a LoRA adapter alone, expected a whole model: merge it into its base {base}"
        " first"
    )


def _instead(directory: Path, lacks: str) -> str:
    """What a directory that is no model directory holds, in words."""
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    if gguf is not None:
        return (
            f"a GGUF file ({gguf.name}), expected a Hugging Face model directory: convert it, or give the"
            " original"
        )
    return f"{lacks}, expected a Hugging Face model directory (config.json, tokenizer, safetensors)"


def read_object(path: Path, key: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises DataError, begun with the configuration's key."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{key}: {path} cannot be read ({error}); expected a JSON object: copy it again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{key}: {path} holds a JSON {type(value).__name__}, expected an object: copy it again"
        )
    return value
