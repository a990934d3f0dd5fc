"""What a run resumes from: float32 weights and Adam's moments, in flat pieces for any number of ranks and
any ZeRO stage.

A rank writes the pieces it owns into one safetensors file, `rank_00000.safetensors`; nothing is pickled.

    "lm_head.weight:weight"       float32, flat: elements [start, start + length) of the parameter in row-major order
    "lm_head.weight:exp_avg"      of the same elements; missing before the first optimiser step, as :exp_avg_sq
    metadata                      {"steps": Adam's own count, "places": {name: [start, elements of the whole parameter]}} as JSON
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_sd.errors import CheckpointError
from megatron_sd.training.parallel.local_shards import full_numel
from megatron_sd.training.state.tensor_file import TensorFile

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_DIFFERENCES = 8  # named in one message


@dataclass(frozen=True, kw_only=True)
class FlatSlice:
    """Elements [start, start + length) of a parameter lie in flat[offset : offset + length], their moments
    at the same place of the optimiser's state of `flat`. total: elements of the whole parameter."""

    name: str
    start: int
    length: int
    total: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view that belongs to this piece; tensor: `flat`, or a moment of it."""
        return tensor.view(-1)[self.offset : self.offset + self.length]


class TrainedState:
    """The state that this rank's optimiser updates, at any ZeRO stage. optimizer: of the DeepSpeed engine;
    rank, size: of it."""

    def __init__(self, optimizer: Any, parameters: Iterator[tuple[str, nn.Parameter]], rank: int, size: int):
        self._wrapper = optimizer
        self._adam: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._parameters = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self._rank, self._size = rank, size

    @property
    def shapes(self) -> dict[str, int]:
        """Elements of every trained parameter."""
        return {name: full_numel(parameter) for name, parameter in self._parameters}

    def pieces(self) -> Iterator[FlatSlice]:
        """What lies in this rank's memory. Raises CheckpointError for state that lies on NVMe."""
        for name, parameter in self._parameters:
            total = full_numel(parameter)
            # ZeRO-3: a run of ceil(total / ranks) elements, the last ones padded
            if hasattr(parameter, "ds_tensor"):
                group, offset, part = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
                if self._wrapper._swappable_optimizer_subgroup(group):
                    raise CheckpointError(
                        f"the optimiser's state of {name} lies on NVMe, expected memory: offload to the CPU"
                    )
                start = min(self._rank * part, total)
                flat, length = self._wrapper.fp32_partitioned_groups_flat[group], min(part, total - start)
            # ZeRO 1 and 2: wherever the group's flat partition cuts it
            elif hasattr(parameter, "_hp_mapping"):
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
                offset = mapping.hp_fragment_address.start
            else:  # stage 0: all of it on every rank
                start, length, flat, offset = 0, total, parameter, 0
            if length:
                yield FlatSlice(name=name, start=start, length=length, total=total, flat=flat, offset=offset)

    def file(self, *, copy: bool = False) -> TensorFile:
        """This rank's file. copy: nothing of it is a view of what is trained on."""
        tensors, places, steps = {}, {}, 0
        for piece in map(self._own_part, self.pieces()):
            state = self._adam.state.get(piece.flat, {})
            steps = int(state.get("step", 0))
            places[piece.name] = [piece.start, piece.total]
            for key, tensor in {
                "weight": piece.flat.detach(),
                **{key: state[key] for key in MOMENTS if key in state},
            }.items():
                # in host memory a view, unless a copy is asked for
                tensors[f"{piece.name}:{key}"] = piece.of(tensor).to("cpu", torch.float32, copy=copy)
        return TensorFile(tensors, {"steps": str(steps), "places": json.dumps(places)})

    def read(self, paths: Sequence[Path]) -> int:
        """Take up what `file` gave on all ranks of a run, then call `spread`; Adam's own count of steps.
        Raises CheckpointError for another model's, with the differences, and when elements are missing."""
        with ExitStack() as stack:
            saved = [SavedPieces(stack.enter_context(safe_open(path, "pt"))) for path in paths]
            check_same_parameters(
                {name: total for file in saved for name, (_, total) in file.places.items()}, self.shapes
            )
            steps = max((file.steps for file in saved), default=0)
            self._forget_moments()
            for piece in self.pieces():
                piece.of(piece.flat.data).copy_(_assembled(saved, piece, "weight"))
                for key in MOMENTS if steps else ():
                    piece.of(self._moments_of(piece.flat, steps)[key]).copy_(_assembled(saved, piece, key))
        return steps

    def spread(self) -> None:
        """Bring the parameters to the float32 weights: what DeepSpeed does at the end of a step.
        Collective."""
        wrapper = self._wrapper
        if hasattr(wrapper, "fp32_partitioned_groups_flat"):
            wrapper.checkpoint_event_prologue()
            if wrapper.persistent_parameters:
                wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
            for group in range(len(wrapper.fp32_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            wrapper.checkpoint_event_epilogue()
        elif hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()

    def _own_part(self, piece: FlatSlice) -> FlatSlice:
        """Of a piece that every rank has, the part that this rank writes."""
        if piece.length < piece.total or self._size == 1 or hasattr(self._wrapper, "optimizer"):
            return piece
        start, stop = (piece.total * rank // self._size for rank in (self._rank, self._rank + 1))
        return FlatSlice(
            name=piece.name,
            start=start,
            length=stop - start,
            total=piece.total,
            flat=piece.flat,
            offset=start,
        )

    def _forget_moments(self) -> None:
        self._adam.state.clear()
        if hasattr(self._wrapper, "_hp_optimizer_states_linked"):
            self._wrapper._hp_optimizer_states_linked = False

    def _moments_of(self, flat: Tensor, steps: int) -> dict[str, Any]:
        """The optimiser's state of `flat`, begun if there is none. torch counts steps in a tensor,
        DeepSpeed's Adam in an int."""
        state = self._adam.state[flat]
        if not state:
            where = flat.device if self._adam.defaults.get("fused") else "cpu"
            state["step"] = (
                torch.tensor(float(steps), device=where)
                if isinstance(self._adam, torch.optim.AdamW)
                else steps
            )
            state.update({key: torch.zeros_like(flat.data) for key in MOMENTS})
        return state


class SavedPieces:
    """One rank's file. file: as safe_open gave it; tensors are read when they are asked for."""

    def __init__(self, file: Any):
        metadata = file.metadata() or {}
        self._file = file
        self.steps = int(metadata.get("steps", 0))
        self.places: Mapping[str, tuple[int, int]] = json.loads(metadata.get("places", "{}"))

    def elements(self, name: str, key: str) -> tuple[int, Any] | None:
        """Where the file's elements of a parameter begin, and the tensor of them, still on disk."""
        if name not in self.places:
            return None
        return self.places[name][0], self._file.get_slice(f"{name}:{key}")


def _assembled(saved: Sequence[SavedPieces], piece: FlatSlice, key: str) -> Tensor:
    """[piece.length] float32, from every file that has some of it."""
    values, found = torch.empty(piece.length), 0
    for file in saved:
        here = file.elements(piece.name, key)
        if here is None:
            continue
        first, elements = here
        low, high = max(first, piece.start), min(first + elements.get_shape()[0], piece.start + piece.length)
        if low < high:
            values[low - piece.start : high - piece.start] = elements[low - first : high - first]
            found += high - low
    if found != piece.length:
        raise CheckpointError(
            f"{piece.name}:{key}: the files hold {found} of the elements [{piece.start},"
            f" {piece.start + piece.length}), expected {piece.length}: a rank's file is missing or there"
            " twice"
        )
    return values


def listed(differences: Sequence[str]) -> str:
    """The first of them in one line, and how many more there are."""
    more = f"; and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else ""
    return "; ".join(differences[:MAX_DIFFERENCES]) + more


def check_same_parameters(saved: Mapping[str, int], own: Mapping[str, int]) -> None:
    """Raise CheckpointError naming the parameters that only one side has, or whose numbers of elements
    differ."""
    differences = [
        f"{name}: {saved.get(name, 'no')} elements in the checkpoint, {own.get(name, 'no')} in the model"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint is another model's ({len(differences)} parameters differ):"
            f" {listed(differences)}; restore model.path, or choose another run_dir"
        )
