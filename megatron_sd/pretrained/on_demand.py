"""Models whose weights are read from their files later, element by element where they are wanted: by the
rank that owns them.

The parameters of such a model are memory that nobody has written yet, which costs nothing, and each knows
its tensor in the files. Ranks read their own elements from the mapped file; what no rank of a node owns is
never read there.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megatron_sd.pretrained.directory import StoredTensor, stored_tensors

log = logging.getLogger(__name__)

# by safetensors' words
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ_ELEMENTS = 1 << 24  # at a time
_ATTRIBUTE = "stored_tensor"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A parameter's tensor in a mapped safetensors file."""

    tensor: StoredTensor
    pages: mmap.mmap

    def read(self, target: Tensor, start: int, stop: int) -> None:
        """Write the elements [start, stop) of the tensor, in the order of its flat view, into `target`
        [stop - start], cast."""
        dtype = DTYPES[self.tensor.dtype]
        for low in range(start, stop, _READ_ELEMENTS):
            count = min(_READ_ELEMENTS, stop - low)
            offset = self.tensor.offset + low * dtype.itemsize
            target[low - start : low - start + count].copy_(
                torch.frombuffer(self.pages, dtype=dtype, offset=offset, count=count)
            )


def stored_in(parameter: nn.Parameter) -> Stored | None:
    """Where the parameter's values are to be read; None: they are in it."""
    return getattr(parameter, _ATTRIBUTE, None)


def load_on_demand(
    path: str, *, dtype: torch.dtype, attention: str, config: PretrainedConfig, key: str
) -> PreTrainedModel | None:
    """The model of a directory, without its weights. None where only transformers itself can read them:
    files of another format or dtype, or whose tensors are not the model's one by one (renamed, fused,
    missing: then it also knows what to say).

    Raises DataError for files that are not whole.
    """
    tensors = stored_tensors(Path(path), key)
    if tensors is None:
        return None
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    with contextlib.suppress(OSError):  # a model without settings of its own
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    found = _match(model, tensors)
    if found is None or _keeps_float32(model):
        log.info(
            "%s %s: every rank loads the whole model, its files do not hold the parameters one by one",
            key,
            path,
        )
        return None
    pages = {file: _map(file) for file in {tensor.file for tensor in tensors.values()}}
    for parameter, tensor in found:
        setattr(parameter, _ATTRIBUTE, Stored(tensor=tensor, pages=pages[tensor.file]))
    return model.eval()


def forget_file(parameter: nn.Parameter) -> None:
    """The values are in the parameter now, or will come from elsewhere."""
    if stored_in(parameter) is not None:
        delattr(parameter, _ATTRIBUTE)


def _match(
    model: PreTrainedModel, tensors: dict[str, StoredTensor]
) -> list[tuple[nn.Parameter, StoredTensor]] | None:
    """Each parameter with its tensor; None unless there is exactly one for each, of its shape, and no
    other."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for parameter, own in names.items():
        stored = [tensors[name] for name in own if name in tensors]
        if len(stored) != 1 or stored[0].shape != tuple(parameter.shape) or not _can_map(stored[0]):
            return None
        found.append((parameter, stored[0]))
    return found if len(found) == len(tensors) and not _has_stored_buffers(model) else None


def _has_stored_buffers(model: PreTrainedModel) -> bool:
    """The files may hold more than parameters."""
    return bool(model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys())


def _can_map(tensor: StoredTensor) -> bool:
    return tensor.dtype in DTYPES and tensor.offset % DTYPES[tensor.dtype].itemsize == 0


def _keeps_float32(model: PreTrainedModel) -> bool:
    """The family keeps some modules in float32 whatever dtype is asked for."""
    patterns = model._keep_in_fp32_modules_strict or ()
    return model.dtype != torch.float32 and any(
        re.search(p, name) for p in patterns for name, _ in model.named_parameters()
    )


def _map(file: Path) -> Any:
    """Its pages, which all processes share; copied when somebody writes to them, which nobody does."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
