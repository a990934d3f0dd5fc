"""Checkpoints of a run: DeepSpeed's shards for resuming, the model for everybody else, committed as one directory.

    step_00000040/shards/     DeepSpeed's, one set of files per rank: resume at the same number of ranks, bit for bit
                 model/       safetensors, config and tokenizer: a Hugging Face directory
                 state.json   step, trainer's state, configuration
                 manifest.json

A save fails on all ranks or on none, and never touches the checkpoints before it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_sd.config import Config
from megatron_sd.distributed.collectives import broadcast_object, gather_objects
from megatron_sd.distributed.world import World
from megatron_sd.errors import CheckpointError
from megatron_sd.training import commit
from megatron_sd.training.policy import Policy
from megatron_sd.training.publisher import gathered_buckets, split_buckets

MODEL_FILE_BYTES = 2 << 30
FREE_TO_CHANGE = (
    *("num_steps", "run_dir", "checkpoint.", "log.", "data.eval", "data.max_eval", "rollout.vllm.", "publish."),
    *("retriever.corpus", "retriever.endpoints", "retriever.qdrant", "retriever.client."),  # what it is says corpus_version
)

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves to and loads from one directory. Every rank makes the same calls."""

    def __init__(self, root: Path, config: Config, world: World, *, corpus_version: str):
        self._root = root
        self._config = config
        self._world = world
        self._corpus_version = corpus_version

    def save(self, policy: Policy, *, step: int, state: Mapping[str, Any]) -> None:
        """Commit a checkpoint of `step`, then prune to checkpoint.keep; a step already committed is left alone.

        state: what the trainer wants back from load, as JSON values. Raises CheckpointError on every rank when any rank could
        not write; what was written of it is removed, the checkpoints before it stay.
        """
        directory = commit.directory_of(self._root, step)
        if broadcast_object(self._world, directory.exists()):
            return
        staging = commit.staging_of(directory)
        self._together(staging, lambda: self._prepare(staging), only_first=True)
        self._together(staging, lambda: policy.save_shards(staging))
        self._together(staging, lambda: self._save_model(policy, staging / "model"))
        self._together(staging, lambda: self._save_state(staging, step, state), only_first=True)
        shares = self._together(staging, lambda: commit.seal(staging, (self._world.rank, self._world.size)))
        seals = {name: entry for share in shares for name, entry in share.items()}
        self._together(staging, lambda: commit.commit(staging, directory, seals), only_first=True)
        self._together(staging, lambda: commit.prune(self._root, self._config.checkpoint.keep), only_first=True)

    def load(self, policy: Policy) -> dict[str, Any] | None:
        """Bring the policy to the newest checkpoint that verifies; its trainer's state with "step" added, or None when there is
        no checkpoint.

        A checkpoint that does not verify is reported and set aside. Raises CheckpointError when checkpoints exist but none
        verifies, when the one that does belongs to another run, or when checkpoint.resume is off although some exist.
        """
        found = broadcast_object(self._world, commit.committed(self._root))
        if not found:
            return None
        if not self._config.checkpoint.resume:
            raise CheckpointError(
                f"{self._root} holds {len(found)} checkpoints although checkpoint.resume is off: "
                "choose another run_dir, or set checkpoint.resume to true"
            )
        for directory in found:
            if self._verifies(directory):
                return self._load(policy, directory)
        raise CheckpointError(
            f"none of the {len(found)} checkpoints under {self._root} verifies (the log names what is wrong with each): "
            "restore one from a copy, or choose another run_dir to start anew"
        )

    def _verifies(self, directory: Path) -> bool:
        damage = gather_objects(self._world, commit.find_damage(directory, (self._world.rank, self._world.size)))
        problems = [problem for problem in damage if problem is not None]
        if problems and self._world.is_first:
            broken = commit.set_aside(directory)
            logger.error("checkpoint %s does not verify: %s; set aside as %s", directory.name, problems[0], broken.name)
        return not problems

    def _load(self, policy: Policy, directory: Path) -> dict[str, Any]:
        saved = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        self._check_same_run(saved, directory)
        policy.load_shards(directory, version=saved["step"])
        if self._world.is_first:
            logger.info("resumed from %s", directory)
        return {**saved["state"], "step": saved["step"]}

    def _check_same_run(self, saved: Mapping[str, Any], directory: Path) -> None:
        if saved["world_size"] != self._world.size:
            raise CheckpointError(
                f"{directory} was written by {saved['world_size']} ranks, this run has {self._world.size}: start with as many, "
                "or begin a new run from its model/ directory"
            )
        then = _flat({"config": saved["config"], "corpus_version": saved["corpus_version"]})
        now = _flat({"config": json.loads(json.dumps(dataclasses.asdict(self._config))), "corpus_version": self._corpus_version})
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and not key.removeprefix("config.").startswith(FREE_TO_CHANGE):
                raise CheckpointError(
                    f"{directory} belongs to another run: {key.removeprefix('config.')} was {then.get(key)!r} and is now "
                    f"{now.get(key)!r}; restore it, or choose another run_dir"
                )

    def _prepare(self, staging: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        commit.clear_staging(self._root)
        (staging / "model").mkdir(parents=True)
        (staging / "shards").mkdir()

    def _save_model(self, policy: Policy, directory: Path) -> None:
        """Full parameters, gathered a file at a time; the first rank writes, and keeps gathering when it cannot."""
        num_files = len(list(split_buckets(policy.named_parameters(), MODEL_FILE_BYTES)))
        locations: dict[str, str] = {}
        failure: Exception | None = None
        for number, bucket in enumerate(gathered_buckets(policy.named_parameters(), MODEL_FILE_BYTES), start=1):
            name = "model.safetensors" if num_files == 1 else f"model-{number:05d}-of-{num_files:05d}.safetensors"
            locations |= dict.fromkeys((key for key, _ in bucket), name)
            if self._world.is_first and failure is None:
                try:
                    save_file({key: tensor.cpu() for key, tensor in bucket}, directory / name, metadata={"format": "pt"})
                except (OSError, SafetensorError) as error:
                    failure = error
        if failure is not None:
            raise failure
        if self._world.is_first and num_files > 1:
            index = {"metadata": {}, "weight_map": locations}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _save_state(self, staging: Path, step: int, state: Mapping[str, Any]) -> None:
        copy_model_description(Path(self._config.model.path), staging / "model")
        record = {
            "step": step,
            "state": state,
            "world_size": self._world.size,
            "corpus_version": self._corpus_version,
            "config": dataclasses.asdict(self._config),
        }
        (staging / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _together(self, staging: Path, action: Callable[[], Any], *, only_first: bool = False) -> list[Any]:
        """The action's values from all ranks. When it fails on one rank, every rank raises CheckpointError."""
        value, failure = None, None
        try:
            if self._world.is_first or not only_first:
                value = action()
        except (OSError, SafetensorError) as error:
            failure = f"{error}"
        results = gather_objects(self._world, (value, failure))
        failures = [f"rank {rank}: {failed}" for rank, (_, failed) in enumerate(results) if failed is not None]
        if failures:
            free_bytes = shutil.disk_usage(self._root if self._root.is_dir() else Path.cwd()).free
            if self._world.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"could not write {staging} ({failures[0]}); {free_bytes / 2**20:.1f} MiB were free on its disk: make room and "
                "resume; the checkpoints before it are untouched"
            )
        return [result for result, _ in results]


def copy_model_description(source: Path, target: Path) -> None:
    """Configuration and tokenizer files of a model directory, without its weights."""
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
