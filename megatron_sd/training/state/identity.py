"""What a run that goes on must have in common with the one that was left.

Every key of the configuration is of one of three kinds:

- a knob changes memory, speed, placement or what is logged, not what is computed: it may always be another;
- the plan (learning rate, batch, limits, weights of the loss) may be changed on purpose, by
checkpoint.allow_changes, and each
  change is kept in the checkpoints from then on;
- all others are identity: another value is another run.

num_steps is a knob while the learning rate is constant, and of the plan under one that decays towards the
last step.

A path is no identity: what lies there is, by digest (`contents`). A key that an old checkpoint does not
have counts as its default, so that new keys divide no run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_sd.config import Config, DataConfig, ModelConfig, RetrieverConfig
from megatron_sd.config.load import flat
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import World
from megatron_sd.errors import DataError
from megatron_sd.own_code.loading import digests
from megatron_sd.training.state.optimizer_state import listed

KNOBS = (
    *("num_steps", "run_dir", "checkpoint.", "log.", "safety.", "publish.", "data.eval", "data.max_eval"),
    # where something lies: what it is say contents and corpus_version
    *(
        "model.path",
        "data.train",
        "data.pass_rates",
        "retriever.corpus",
        "retriever.endpoints",
        "retriever.client.",
    ),
    *("retriever.qdrant", "retriever.opensearch", "distill.teacher_path", "critic.path"),
    *(f"reward.judge.{key}" for key in ("url", "key_file", "deadline_s", "tries", "max_concurrent", "store")),
    *(f"retriever.web.{key}" for key in ("store", "token_file", "max_calls", "max_connections")),
    *(
        "retriever.web.deadline_s",
        "retriever.web.try_timeout_s",
        "retriever.search.rerank.batch_size",
        "retriever.search.rerank.model",
    ),
    *("retriever.search.device", "model.attention", "model.gradient_checkpointing"),
    *("rollout.vllm.", "rollout.bank", "rollout.max_concurrent_sequences", "rollout.max_failed_share"),
    *(
        "update.zero_stage",
        "update.sequence_parallel_size",
        "update.pack_sequences",
        "update.offload_",
        "update.nvme_path",
    ),
    *("update.max_microbatch_tokens", "update.head_chunk_rows"),
)
# Keys of older checkpoints: today's key, and today's words for values.
_RENAMED = {"policy_loss.advantage": ("advantage.estimator", {"group": "grpo"})}
PLAN = (
    *("optimizer.", "policy_loss.", "advantage.", "critic.", "distill.alpha.", "distill.measure_every"),
    *("rollout.questions_per_step", "rollout.group_size", "rollout.temperature", "rollout.max_"),
)
_SAMPLED = (".safetensors", ".bin")
_WHOLE_BYTES = 1 << 24  # weights up to this size are read whole
_SAMPLE_BYTES = 1 << 16  # of every _STRIDE bytes of larger ones
_STRIDE = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key of the plan that has another value from `step` on. was, now: JSON values."""

    step: int
    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r} and is now {self.now!r}"


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Between a checkpoint and the run that reads it, as lines; `plan` as it may be recorded."""

    identity: tuple[str, ...]
    plan: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.identity or self.plan)


def contents_of(config: Config) -> dict[str, str]:
    """Digests of what lies where the configuration points: the start model (configuration, tokenizer,
    weights), the training questions, a teacher or a critic of another checkpoint, functions of the user's
    own. Of large weights 64 KiB of every 8 MiB are looked at: other weights differ everywhere. Text is read
    whole."""
    beside = {"teacher": config.distill.teacher_path}
    if config.advantage.estimator == "gae":
        beside["critic"] = config.critic.path
    return {
        "model": model_digest(Path(config.model.path)),
        **{name: _file_digest(path) for name, path in _question_files(config.data)},
        **{name: model_digest(Path(path)) for name, path in beside.items() if path is not None},
        **digests(config),
    }


def _question_files(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(key, path) of what training questions are read from."""
    yield "data.train", data.train
    yield from ((f"data.mix.{name}.train", own.train) for name, own in data.mix.items())
    if data.pass_rates is not None:
        yield "data.pass_rates", data.pass_rates


def _file_digest(path: str) -> str:
    return _digest(Path(path).parent, (Path(path).name,))


def model_digest(directory: Path) -> str:
    """Of configuration, tokenizer and weights, as contents_of says."""
    weights = ("*.safetensors", "pytorch_model*.bin")
    described = (
        "config.json",
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "*.jinja",
    )
    return _digest(directory, (*described, *weights))


def check_same_model(path: str, world: World, key: str) -> None:
    """For ranks that read a part each of the directory that the key names. Raises DataError, on every rank,
    when it holds other files on some node: shards of two models make one that is neither. Collective."""
    digests = gather_objects(world, model_digest(Path(path)))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise DataError(
            f"{key}: {path} holds other files on rank {others[0]} than on rank 0 ({len(others)} of"
            f" {world.size} ranks have others), expected one model: copy the same directory to every node"
        )


def run_identity(config: Config, corpus_version: str) -> dict[str, Any]:
    """All that decides what is computed, plan included: by dotted key, as JSON values."""
    return _decisive(_values(config), decays=config.optimizer.decays) | {"corpus_version": corpus_version}


def _decisive(values: Mapping[str, Any], *, decays: bool) -> dict[str, Any]:
    return {key: value for key, value in values.items() if kind_of(key, decays=decays) != "knob"}


def kind_of(key: str, *, decays: bool = False) -> str:
    """knob, plan or identity. decays: the learning rate does, towards the last step."""
    if key == "data.train_split":
        return "identity"
    if key.startswith("data.mix.") and key.endswith(".train"):
        return "knob"
    if key == "num_steps" and decays:
        return "plan"
    return "knob" if key.startswith(KNOBS) else "plan" if key.startswith(PLAN) else "identity"


def differences(
    saved: Mapping[str, Any], config: Config, corpus_version: str, contents: Mapping[str, str]
) -> Differences:
    """saved: a checkpoint's state.json."""
    defaults = _values(_defaults())
    before, after = defaults | _in_todays_words(flat(saved["config"])), defaults | _values(config)
    decays = before["optimizer.schedule"] != "constant" or config.optimizer.decays
    then = _decisive(before, decays=decays) | {"corpus_version": saved["corpus_version"]}
    now = _decisive(after, decays=decays) | {"corpus_version": corpus_version}
    changes = tuple(
        Change(step=saved["step"], key=key, was=then.get(key), now=now.get(key))
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    )
    strangers = tuple(
        f"the content of {key} is another (digest {saved['contents'][key]} then, {digest} now)"
        for key, digest in contents.items()
        if key in saved.get("contents", {}) and saved["contents"][key] != digest
    )
    kinds = [kind_of(change.key, decays=decays) for change in changes]
    other = [str(change) for change, kind in zip(changes, kinds, strict=True) if kind == "identity"]
    plan = tuple(change for change, kind in zip(changes, kinds, strict=True) if kind == "plan")
    return Differences(identity=(*other, *strangers), plan=plan)


def why_refused(found: Differences, *, allow_changes: bool) -> str | None:
    """Why a run may not go on; None: it may."""
    if found.identity:
        lines = (*found.identity, *map(str, found.plan))
        return f"belongs to another run: {listed(lines)}; restore what differs, or choose another run_dir"
    if found.plan and not allow_changes:
        return (
            f"has another plan: {listed([str(change) for change in found.plan])}; restore it, or go on with"
            " the new one by --checkpoint.allow_changes true, which is recorded"
        )
    return None


def _in_todays_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """An old configuration, whose keys or values may have had other names."""
    found = dict(values)
    for old, (new, words) in _RENAMED.items():
        if old in found:
            value = found.pop(old)
            found[new] = words.get(value, value)
    return found


def _defaults() -> Config:
    """The configuration that names nothing but what it must."""
    model, data = ModelConfig(path=""), DataConfig(train="")
    return Config(run_dir="", model=model, data=data, retriever=RetrieverConfig())


def _values(config: Config) -> dict[str, Any]:
    """By dotted key, as JSON values."""
    return flat(json.loads(json.dumps(dataclasses.asdict(config))))


def _digest(directory: Path, patterns: tuple[str, ...]) -> str:
    """Hexadecimal XXH3-64 of names, sizes and bytes of the files, large weights by samples."""
    digest = xxhash.xxh3_64()
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        for block in _looked_at(path):
            digest.update(block)
    return digest.hexdigest()


def _looked_at(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix not in _SAMPLED or size <= _WHOLE_BYTES:
            while block := file.read(_STRIDE):
                yield block
            return
        for start in (*range(0, size, _STRIDE), size - _SAMPLE_BYTES):
            file.seek(start)
            yield file.read(_SAMPLE_BYTES)
