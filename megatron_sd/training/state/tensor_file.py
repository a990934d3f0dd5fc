"""Safetensors files whose checksum is taken while they are written: nobody reads them back for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sd.durable.directories import Seal

# in the format's words
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT = 8  # bytes, of the header's end
_WRITE_BYTES = 1 << 22


class TensorFile(NamedTuple):
    """What a file will hold. tensors: in host memory."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = {}


TensorFiles = dict[str, TensorFile]  # by name


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
    """Write a safetensors file of host tensors to the disk; its size and checksum. Raises OSError naming
    the file.

    The format: the header's length in 8 bytes, a JSON header with every tensor's dtype, shape and place,
    the tensors.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for part in (len(text).to_bytes(8, "little") + text, *map(_bytes_of, tensors.values())):
                for start in range(0, len(part), _WRITE_BYTES):
                    block = part[start : start + _WRITE_BYTES]
                    file.write(block)
                    digest.update(block)
                num_bytes += len(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
