"""Which directory a push uploads, and whether it may: what does not verify is not sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sd.durable.directories import MANIFEST, committed, find_damage
from megatron_sd.errors import DataError
from megatron_sd.pretrained.directory import read_config, stored_tensors

CARD_NAME = "README.md"
KEY = "push"


@dataclass(frozen=True, kw_only=True)
class PushedModel:
    """A model directory. checkpoint: the run's, which it is of; run_dir: of that run; None for a directory
    that no run of ours wrote."""

    directory: Path
    checkpoint: Path | None = None
    run_dir: Path | None = None

    @property
    def files(self) -> list[Path]:
        """Everything in it, hidden files aside."""
        return sorted(
            path
            for path in self.directory.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.directory).parts)
        )


def find_model(path: Path) -> PushedModel:
    """The model that a path means: a model directory, that of a checkpoint (`step_00000200`), or the newest
    one of a run. Reads names only. Raises DataError for another path."""
    if not path.is_dir():
        raise DataError(
            f"{KEY}: found no directory at {path}, expected a run, a checkpoint of it, or a model directory"
        )
    path = path.resolve()
    if (path / "checkpoints").is_dir():
        steps = committed(path / "checkpoints")
        if not steps:
            raise DataError(f"{KEY}: {path} has no checkpoint yet, expected one: wait for checkpoint.every")
        path = steps[0]
    if (path / MANIFEST).is_file() and (path / "model").is_dir():
        path = path / "model"
    checkpoint = path.parent if path.name == "model" and (path.parent / MANIFEST).is_file() else None
    run_dir = checkpoint.parent.parent if checkpoint and checkpoint.parent.name == "checkpoints" else None
    return PushedModel(directory=path, checkpoint=checkpoint, run_dir=run_dir)


def verify(model: PushedModel) -> None:
    """Raise DataError for a checkpoint with a changed, missing or further file, and for a directory that is
    no whole model."""
    damage = None if model.checkpoint is None else find_damage(model.checkpoint)
    if damage is not None:
        raise DataError(
            f"{KEY}: {model.checkpoint} does not verify: {damage}; expected it as it was written: push"
            " another checkpoint, or copy this one again"
        )
    read_config(model.directory, KEY)
    stored_tensors(model.directory, KEY)
    if not any(model.directory.glob("tokenizer*")):
        raise DataError(
            f"{KEY}: {model.directory} has no tokenizer, expected tokenizer.json or its like beside the"
            " weights: copy it from the model it was trained from"
        )
