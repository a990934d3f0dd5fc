"""Checkpoints of a run: what it resumes from and the model for everybody else, committed as one directory.

    step_00000040/shards/     one safetensors file a rank (optimizer_state.py): resume at any number of ranks and any ZeRO
                              stage, and where both are the same, bit for bit
                 model/       safetensors, config and tokenizer: a Hugging Face directory
                 state.json   step, trainer's state, configuration
                 manifest.json

A save fails on all ranks or on none, and never touches the checkpoints before it. Nothing is pickled, and
nothing is read before its checksum has been verified.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from megatron_sd.config import Config
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import World
from megatron_sd.durable import directories
from megatron_sd.durable.files import flush
from megatron_sd.errors import CheckpointError
from megatron_sd.training.parallel.local_shards import full_numel
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import gathered_buckets, split_buckets
from megatron_sd.training.state.identity import Change, contents_of, differences, why_refused
from megatron_sd.training.state.tensor_file import TensorFile
from megatron_sd.training.state.writing import Writing

MODEL_FILE_BYTES, LEAST_FILE_BYTES = 2 << 30, 256 << 20
FORMAT = 2  # 1 held DeepSpeed's own files

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves to and loads from one directory. Every rank makes the same calls."""

    def __init__(self, root: Path, config: Config, world: World, *, corpus_version: str):
        self._root = root
        self._config = config
        self._world = world
        self._corpus_version = corpus_version
        self._changes: list[Mapping[str, Any]] = []
        self._writing: Writing | None = None

    @property
    def plan_changes(self) -> list[tuple[int, str]]:
        """What has been changed of the plan since the run began: from which step on, and in words."""
        return [
            (change["step"], f"from step {change['step']} on {Change(**change)}") for change in self._changes
        ]

    def save(self, policy: Policy, *, step: int, state: Mapping[str, Any], wait: bool = True) -> None:
        """Commit a checkpoint of `step`, then prune to checkpoint.keep; a step already committed is left
        alone. Without `wait`, under checkpoint.background, all of it is copied to host memory, and `settle`
        commits it.

        state: what the trainer wants back from load, as JSON values. Raises CheckpointError on every rank
        when any rank could not write, that of an earlier `save` too; what was written of it is removed, the
        checkpoints before it stay.
        """
        self.settle()
        directory = directories.directory_of(self._root, step)
        staging = directories.staging_of(directory)
        if self._write_together(staging, directory.exists, only_first=True)[0]:
            return
        self._write_together(staging, lambda: self._prepare(staging), only_first=True)
        copy = self._config.checkpoint.background and not wait
        record = self._record(policy.version, step, state) if self._world.is_first else ""
        writing = self._writing = Writing(directory, record)
        self._write_together(staging, lambda: writing.add("shards", policy.files(copy=copy)))
        self._write_together(staging, lambda: self._save_model(policy, writing, copy=copy))
        if not copy:
            self.settle()

    def settle(self, *, wait: bool = True) -> None:
        """Commit what an earlier `save` left to be written; without `wait`, if all ranks have written it by
        now. Collective; raises what `save` raises."""
        writing = self._writing
        if writing is None:
            return
        if not wait and not all(gather_objects(self._world, writing.is_done())):
            return
        parts = self._write_together(writing.staging, writing.seals)
        seals = {name: seal for own in parts for name, seal in own.items()}
        self._write_together(writing.staging, lambda: self._save_state(writing), only_first=True)
        self._write_together(writing.staging, lambda: writing.commit(seals), only_first=True)
        self._writing = None
        if self._world.is_first:
            self._tidy(writing.directory)

    def abandon(self) -> None:
        """This rank ends without having settled: what was being written goes, so that it fills no disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()
            if self._world.is_first:
                shutil.rmtree(writing.staging, ignore_errors=True)

    def newest_step(self) -> int | None:
        """Of the committed checkpoints, verified or not; None without one. The first rank looks, when what is
        being written is there."""
        self.settle()
        found = self._read_together(lambda: directories.committed(self._root), only_first=True)[0]
        return int(found[0].name.removeprefix("step_")) if found else None

    def load(self, policy: Policy) -> dict[str, Any] | None:
        """Bring the policy to the newest checkpoint that verifies; its trainer's state with "step" added,
        or None when there is no checkpoint.

        A checkpoint that does not verify is reported and set aside. Raises CheckpointError when checkpoints
        exist but none verifies, and when the one that does belongs to another run or model, with the
        differences.
        """
        self.settle()
        found = self._read_together(lambda: directories.committed(self._root), only_first=True)[0]
        for directory in found:
            if self._verifies(directory):
                return self._load(policy, directory)
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints under {self._root} verifies (the log names what is"
                " wrong with each): restore one from a copy, or choose another run_dir to start anew"
            )
        return None

    def refuse_when_resume_is_off(self) -> None:
        """Raise CheckpointError when checkpoint.resume is off although checkpoints exist: a run would
        overwrite another's."""
        if not self._config.checkpoint.resume and self.newest_step() is not None:
            raise CheckpointError(
                f"{self._root} holds checkpoints although checkpoint.resume is off: "
                "choose another run_dir, or set checkpoint.resume to true"
            )

    def _verifies(self, directory: Path) -> bool:
        damage = gather_objects(
            self._world, directories.find_damage(directory, (self._world.rank, self._world.size))
        )
        problems = [problem for problem in damage if problem is not None]
        if problems:
            broken = self._read_together(lambda: directories.set_aside(directory), only_first=True)[0]
            if self._world.is_first:
                logger.error(
                    "checkpoint %s does not verify: %s; set aside as %s",
                    directory.name,
                    problems[0],
                    broken.name,
                )
        return not problems

    def _load(self, policy: Policy, directory: Path) -> dict[str, Any]:
        saved = self._read_together(
            lambda: json.loads((directory / "state.json").read_text(encoding="utf-8"))
        )[0]
        self._check_same_run(saved, directory)
        self._read_together(lambda: policy.read_state(directory / "shards"))
        policy.go_on(saved["version"])
        if self._world.is_first:
            logger.info("resumed from %s, which %d ranks wrote", directory, saved["world_size"])
        return {**saved["state"], "step": saved["step"]}

    def _check_same_run(self, saved: Mapping[str, Any], directory: Path) -> None:
        if saved.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory} has format {saved.get('format', 1)}, expected {FORMAT}: begin a new run from"
                " its model/ directory"
            )
        contents = self._read_together(lambda: self._contents, only_first=True)[0]
        found = differences(saved, self._config, self._corpus_version, contents)
        reason = why_refused(found, allow_changes=self._config.checkpoint.allow_changes)
        if reason is not None:
            raise CheckpointError(f"{directory} {reason}")
        self._changes = [*saved.get("changes", []), *map(dataclasses.asdict, found.plan)]
        for _, words in self.plan_changes[-len(found.plan) :] if found.plan and self._world.is_first else ():
            logger.warning("%s", words)

    @functools.cached_property
    def _contents(self) -> Mapping[str, str]:
        """What the run began from, looked at once."""
        return contents_of(self._config)

    def _prepare(self, staging: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        directories.clear_staging(self._root)
        (staging / "model").mkdir(parents=True)
        (staging / "shards").mkdir()

    def _save_model(self, policy: Policy, writing: Writing, *, copy: bool) -> None:
        """Full parameters, gathered a file at a time; ranks write in turn, each beside the gathering of the
        next files, and keep gathering when they cannot. copy: all of this rank's files are in memory at one
        time, not one."""
        size, rank = self._world.size, self._world.rank
        file_bytes = bytes_of_file(policy.named_parameters(), num_ranks=size)
        num_files = len(list(split_buckets(policy.named_parameters(), file_bytes)))
        locations: dict[str, str] = {}
        # Gathering is collective: every rank draws every bucket, whatever becomes of its own files.
        for number, bucket in enumerate(gathered_buckets(policy.named_parameters(), file_bytes)):
            name = (
                "model.safetensors"
                if num_files == 1
                else f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
            )
            locations |= dict.fromkeys((key for key, _ in bucket), name)
            if number % size == rank:
                if not copy:
                    writing.wait()
                own = {key: tensor.to("cpu", copy=copy or num_files > 1) for key, tensor in bucket}
                writing.add("model", {name: TensorFile(own, {"format": "pt"})})
                if not copy and num_files == 1:
                    writing.wait()  # it is valid within this turn of the loop
        if self._world.is_first and num_files > 1:
            index = {"metadata": {}, "weight_map": locations}
            (writing.staging / "model" / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=1), encoding="utf-8"
            )

    def _save_state(self, writing: Writing) -> None:
        staging = writing.staging
        copy_model_description(Path(self._config.model.path), staging / "model")
        (staging / "state.json").write_text(writing.record, encoding="utf-8")
        others = [path for path in (staging / "model").iterdir() if path.suffix != ".safetensors"]
        flush([staging / "state.json", *others])

    def _record(self, version: int, step: int, state: Mapping[str, Any]) -> str:
        """What state.json holds."""
        record = {
            "format": FORMAT,
            "step": step,
            "version": version,
            "state": state,
            "world_size": self._world.size,
            "corpus_version": self._corpus_version,
            "contents": self._contents,
            "changes": self._changes,
            "config": dataclasses.asdict(self._config),
        }
        return json.dumps(record, indent=1)

    def _tidy(self, directory: Path) -> None:
        """What may fail without harm: the checkpoint stands."""
        try:
            directories.point_to(directory)
            directories.prune(self._root, self._config.checkpoint.keep)
        except OSError as error:
            logger.error("%s is committed, but what it replaces could not be tidied up: %s", directory, error)

    def _read_together(self, action: Callable[[], Any], *, only_first: bool = False) -> list[Any]:
        """The action's values from all ranks. When it fails on one rank, every rank raises
        CheckpointError."""
        results, failures = self._attempt_together(action, only_first=only_first)
        if failures:
            raise CheckpointError(f"could not read a checkpoint under {self._root} ({failures[0]})")
        return results

    def _write_together(
        self, staging: Path, action: Callable[[], Any], *, only_first: bool = False
    ) -> list[Any]:
        """The same; the first rank removes what was written, when nobody writes any more."""
        results, failures = self._attempt_together(action, only_first=only_first)
        if failures:
            if self._writing is not None:
                self._writing.wait()
                self._writing = None
            gather_objects(self._world, None)
            if self._world.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            free_bytes = shutil.disk_usage(self._root if self._root.is_dir() else Path.cwd()).free
            raise CheckpointError(
                f"could not write {staging} ({failures[0]}); {free_bytes / 2**20:.1f} MiB are free on its"
                " disk: make room and resume; the checkpoints before it are untouched"
            )
        return results

    def _attempt_together(
        self, action: Callable[[], Any], *, only_first: bool
    ) -> tuple[list[Any], Sequence[str]]:
        """The action's values from all ranks, and what failed on which."""
        value, failure = None, None
        try:
            if self._world.is_first or not only_first:
                value = action()
        except (OSError, SafetensorError, CheckpointError) as error:
            failure = f"rank {self._world.rank}: {error}"
        results = gather_objects(self._world, (value, failure))
        return [result for result, _ in results], [failed for _, failed in results if failed is not None]


def bytes_of_file(parameters: Iterable[tuple[str, nn.Parameter]], *, num_ranks: int) -> int:
    """Of the model's files: so small that every rank has one to write, within bounds."""
    total = sum(full_numel(parameter) * parameter.element_size() for _, parameter in parameters)
    return min(max(-(-total // num_ranks), LEAST_FILE_BYTES), MODEL_FILE_BYTES)


def copy_model_description(source: Path, target: Path) -> None:
    """Configuration and tokenizer files of a model directory, without its weights."""
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
