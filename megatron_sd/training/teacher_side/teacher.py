"""Whose weights the teacher has: the student's own (the paper's), the start policy's, an average that follows
the student, or another checkpoint's.

A live teacher is read inside the policy's forward and costs no memory. All others are a second model,
sharded by a DeepSpeed engine of its own where the policy is (ZeRO-3), else whole on every rank; it reads
what the live teacher would read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import deepspeed
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_sd.config import DistillConfig
from megatron_sd.distributed.world import World
from megatron_sd.errors import CheckpointError, ConfigError
from megatron_sd.pretrained.loading import load_config
from megatron_sd.training.deepspeed_config import teacher_config
from megatron_sd.training.microbatch import DeviceMicrobatch
from megatron_sd.training.placement import largest_layer
from megatron_sd.training.policy_module import TeacherRows, teacher_hidden_rows
from megatron_sd.training.start_policy import StartPolicy
from megatron_sd.training.state.identity import check_same_model
from megatron_sd.training.state.tensor_file import TensorFile, TensorFiles

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class Teacher(Protocol):
    """What the policy asks of a teacher. Every rank makes the same calls in the same order."""

    def rows(self, microbatch: DeviceMicrobatch) -> AbstractContextManager[TeacherRows | None]:
        """What the teacher read, valid within the context; None: the policy's own forward reads it."""
        ...

    def follow(self, student: NamedParameters) -> None:
        """The student has taken an optimiser step."""
        ...

    def files(self, world: World, *, copy: bool) -> TensorFiles:
        """What a resumed run cannot find elsewhere: this rank's files. copy: nothing of them is a view of what
        changes."""
        ...

    def load(self, directory: Path, world: World) -> None:
        """Take back what `files` gave. Raises CheckpointError."""
        ...


class LiveTeacher:
    """The student's own weights of this very step: there is nothing to keep."""

    def __init__(self, start: StartPolicy, distill: DistillConfig):
        pass

    def rows(self, microbatch: DeviceMicrobatch) -> AbstractContextManager[None]:
        """Nothing: the policy's own forward reads the teacher's prompts."""
        return nullcontext()

    def follow(self, student: NamedParameters) -> None:
        """Nothing: these weights are the student's."""

    def files(self, world: World, *, copy: bool) -> TensorFiles:
        """No file."""
        return {}

    def load(self, directory: Path, world: World) -> None:
        """Nothing was saved."""


class FrozenTeacher:
    """The start policy."""

    def __init__(self, start: StartPolicy, distill: DistillConfig):
        self._is_sharded = start.is_sharded
        self._model = start.load(on_demand=start.is_sharded)
        settings = teacher_config(
            dtype=start.model.dtype,
            world_size=start.parallel.world.size,
            device_type=start.parallel.world.device.type,
            layer=largest_layer(self._model),
        )
        self._module = start.freeze(TeacherModule(self._model), self._model, settings)

    @contextmanager
    def rows(self, microbatch: DeviceMicrobatch) -> Iterator[TeacherRows]:
        """What these weights make of the teacher's prompts; under ZeRO-3 their head is whole within the
        context."""
        head = self._model.get_output_embeddings()
        with torch.no_grad():
            hidden = self._module(microbatch=microbatch)
        with (
            deepspeed.zero.GatheredParameters(list(head.parameters())) if self._is_sharded else nullcontext()
        ):
            bias = getattr(head, "bias", None)
            yield TeacherRows(hidden, (head.weight.detach(), None if bias is None else bias.detach()))

    def follow(self, student: NamedParameters) -> None:
        """Nothing: it stays where training began."""

    def files(self, world: World, *, copy: bool) -> TensorFiles:
        """No file: a resumed run finds the start policy where it was."""
        return {}

    def load(self, directory: Path, world: World) -> None:
        """Nothing was saved."""


class OtherTeacher(FrozenTeacher):
    """Another model of the same vocabulary: distill.teacher_path. It stays what it is.

    Raises ConfigError where its vocabulary has another size, DataError where its directory holds no model, or
    other files on another node.
    """

    def __init__(self, start: StartPolicy, distill: DistillConfig):
        path = str(distill.teacher_path)  # config/distill_checks.py: there is one
        check_vocabulary(start.model.path, path)
        check_same_model(path, start.parallel.world, "distill.teacher_path")
        other = dataclasses.replace(start.model, path=path)
        super().__init__(dataclasses.replace(start, model=other), distill)


class EmaTeacher(FrozenTeacher):
    """An exponential moving average of the student: decay * teacher + (1 - decay) * student after each
    step, kept in float32.

    Each rank averages what it owns: two engines shard the same parameters alike.
    """

    def __init__(self, start: StartPolicy, distill: DistillConfig):
        super().__init__(start, distill)
        self._decay = distill.ema_decay
        self._parts = {name: _own_part(parameter) for name, parameter in self._model.named_parameters()}
        self._average = {name: part.detach().float().clone() for name, part in self._parts.items()}

    @torch.no_grad()
    def follow(self, student: NamedParameters) -> None:
        """Move this rank's part of the average towards the student's."""
        for name, parameter in student:
            self._average[name].lerp_(_own_part(parameter).float(), 1.0 - self._decay)
        self._publish()

    def files(self, world: World, *, copy: bool) -> TensorFiles:
        """This rank's part of the average, float32."""
        parts = {name: part.to("cpu", copy=copy) for name, part in self._average.items()}
        return {_name(world): TensorFile(parts)}

    @torch.no_grad()
    def load(self, directory: Path, world: World) -> None:
        """Go on with the saved average. Raises CheckpointError when it is missing, or of another number of
        ranks or ZeRO stage."""
        path = directory / _name(world)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, expected the average that distill.teacher ema goes on from"
            )
        saved = load_file(path)
        if {name: part.shape for name, part in saved.items()} != {
            name: part.shape for name, part in self._average.items()
        }:
            raise CheckpointError(
                f"{path} holds other parts than this rank's: resume at as many ranks and the ZeRO stage"
                " it had"
            )
        self._average = {name: part.to(self._average[name].device) for name, part in saved.items()}
        self._publish()

    def _publish(self) -> None:
        for name, part in self._parts.items():
            part.copy_(self._average[name])


class TeacherModule(nn.Module):
    """A frozen causal language model whose forward returns the teacher's hidden states."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, microbatch: DeviceMicrobatch) -> Tensor:
        """[Q, H] last hidden states at the teacher's rows."""
        return teacher_hidden_rows(self.model, microbatch)


TEACHERS: dict[str, Callable[[StartPolicy, DistillConfig], Teacher]] = {
    "live": LiveTeacher,
    "ema": EmaTeacher,
    "frozen": FrozenTeacher,
    "other": OtherTeacher,
}


def check_vocabulary(model_path: str, teacher_path: str) -> None:
    """Raise ConfigError where two models have logits of other lengths, DataError for a directory that holds
    no model."""
    own = load_config(model_path).vocab_size
    teachers = load_config(teacher_path, "distill.teacher_path").vocab_size
    if own != teachers:
        raise ConfigError(
            f"distill.teacher_path: found a vocabulary of {teachers} entries in {teacher_path} beside {own}"
            f" in {model_path} (model.path), expected as many: their distributions are compared entry by entry;"
            " choose a teacher of the same vocabulary, or cut or pad one of the heads to the other's size"
        )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's shard under ZeRO-3, else the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _name(world: World) -> str:
    return f"teacher_{world.rank:05d}.safetensors"
