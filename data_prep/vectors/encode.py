"""Passages to vectors, shard by shard: whatever kills it, the next start goes on from the shards that are
whole.

vectors-00000.npy    float16 [rows_per_shard, dim]; row i of the directory is passage i
encoder/*            a copy of the encoder, which goes with its vectors to the index and to the service
passage_encoder/*    where queries have an encoder of their own (DPR): the passages'; `encoder` is then the queries'
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_prep.passages.sourced import SourcedPassage, from_batch
from data_prep.passages.table import PassageTable
from data_prep.vectors.parts import check_part, part_directory, remove_parts, take_shards
from megatron_sd.durable.files import whole_file
from megatron_sd.durable.resumable import PLAN_NAME, Plan, begin, check_absent, locked, partial_of
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.encoder import Encoder, EncoderSettings, choose_device
from megatron_sd.retrieval.corpus.encoder_dense import copy_dense
from megatron_sd.retrieval.corpus.encoder_files import read_card
from megatron_sd.retrieval.corpus.manifest import Manifest, file_entries, file_entry, write_manifest
from megatron_sd.retrieval.corpus.passages import join_contents

log = logging.getLogger(__name__)

_ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # what loading needs; no pickles, no code
_OF_PASSAGES = "passage_encoder"
_SEALED = ("vectors-", "encoder/", f"{_OF_PASSAGES}/")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """`sd-search data encode`: passages to vectors. For E5: query_prefix "query: ", passage_format
    "passage: {contents}".

    What is None is as the encoder's own files say (sentence-transformers'), else mean, "", True and 256.
    """

    passages: str  # a passages directory
    encoder: str  # a local Hugging Face directory
    output: str  # a vectors directory
    query_encoder: str | None = None  # of queries, where they have one of their own (DPR's question encoder)
    pooling: Literal["mean", "cls", "last"] | None = None  # what becomes the vector
    query_prefix: str | None = None  # before each query
    passage_format: str = "{contents}"  # fields: {title} {text} {contents}, the last as Search-R1 writes them
    normalize: bool | None = None  # to length 1
    max_tokens: int | None = None  # of a passage or query; the rest is cut
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the encoder
    batch_size: int = 64  # passages of one forward
    rows_per_shard: int = 16384  # what a kill can lose
    devices: tuple[str, ...] = ("auto",)  # one process each: [cuda:0, cuda:1]
    # [2, 8]: the third of eight machines' shares; without it what the parts have done is joined, and the rest made
    part: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What one process does: the shards start, start + step, ... of the directory."""

    config: EncodeConfig
    directory: Path
    device: str
    start: int
    step: int


def encode_passages(config: EncodeConfig) -> str:
    """Encode every passage, or take what parts have encoded, and return the version of the vectors directory.
    The same input gives the same bytes, killed or not, in parts or not.

    Raises DataError for a damaged input, an output that exists, or one begun from something else.
    """
    output = Path(config.output)
    check_absent(output)
    check_config(config)
    table = PassageTable(Path(config.passages))
    partial = partial_of(output)
    with locked(partial):
        plan = begin_vectors(partial, config, table)
        take_shards(output, partial, plan)
        _run(_tasks(config, partial, (0, 1)))
        vectors_version = seal_vectors(partial, config, table)
        partial.rename(output)
    remove_parts(output)
    log.info("%s: %d vectors, version %s", output, len(table), vectors_version[:16])
    return vectors_version


def encode_part(config: EncodeConfig, part: tuple[int, int]) -> Path:
    """Encode this part's shards, every part[1]-th from number part[0] on, and return where they lie until
    encode_passages joins them. Killed, it goes on after its whole shards. Raises as encode_passages."""
    output, directory = Path(config.output), part_directory(Path(config.output), part)
    check_absent(output)
    check_part(part)
    check_config(config)
    table = PassageTable(Path(config.passages))
    with locked(directory):
        begin_vectors(directory, config, table)
        _run(_tasks(config, directory, part))
    return directory


def _tasks(config: EncodeConfig, directory: Path, part: tuple[int, int]) -> list[_Task]:
    """One a device."""
    (number, of), num_devices = part, len(config.devices)
    return [
        _Task(config=config, directory=directory, device=device, start=number + of * n, step=of * num_devices)
        for n, device in enumerate(config.devices)
    ]


def begin_vectors(
    partial: Path, config: EncodeConfig, table: PassageTable, taken_from: Mapping[str, Any] | None = None
) -> Plan:
    """Lay down plan and encoder, or check that what lies there was begun from the same. taken_from: what
    the vectors are read from, where they are not made here."""
    plan = _plan(config, table, taken_from)
    begin(partial, plan)
    copy_encoder(Path(config.encoder), partial / passage_encoder(config))
    if config.query_encoder is not None:
        copy_encoder(Path(config.query_encoder), partial / "encoder")
        dims = [
            Encoder(partial / name, encoder_settings(config), torch.device("cpu")).dim
            for name in ("encoder", _OF_PASSAGES)
        ]
        if dims[0] != dims[1]:
            raise DataError(
                f"query_encoder: {config.query_encoder} makes vectors of {dims[0]} numbers, expected"
                f" {dims[1]}, as {config.encoder}: give two encoders of one training"
            )
    return plan


def _plan(config: EncodeConfig, table: PassageTable, taken_from: Mapping[str, Any] | None = None) -> Plan:
    begun_from: dict[str, Any] = {
        "passages": table.version,
        "encoder": _encoder_entries(Path(config.encoder)),
        "settings": dataclasses.asdict(encoder_settings(config)),
        "rows_per_shard": config.rows_per_shard,
    }
    if taken_from is not None:
        begun_from["taken_from"] = dict(taken_from)
    if config.query_encoder is not None:
        begun_from["query_encoder"] = _encoder_entries(Path(config.query_encoder))
    return Plan(begun_from=begun_from, finished=("vectors-*.npy",))


def passage_encoder(config: EncodeConfig) -> str:
    """The folder of the encoder that reads passages, in the directory that is made."""
    return "encoder" if config.query_encoder is None else _OF_PASSAGES


def _encoder_entries(encoder: Path) -> dict[str, Any]:
    """Size and checksum of the files that make the vectors."""
    paths = {path.name: path for path in _encoder_files(encoder)}
    paths |= {
        f"{name}/{path.name}": path
        for name in read_card(encoder).dense
        for path in sorted((encoder / name).glob("*.*"))
    }
    return {name: dataclasses.asdict(file_entry(path)) for name, path in paths.items()}


def _encoder_files(encoder: Path) -> list[Path]:
    if not (encoder / "config.json").is_file():
        raise DataError(
            f"{encoder} is no encoder directory: found no config.json; expected a local Hugging Face model"
        )
    return sorted(path for pattern in _ENCODER_FILES for path in encoder.glob(pattern))


def copy_encoder(encoder: Path, target: Path) -> None:
    """What loading needs of an encoder directory. Raises DataError when it is none."""
    paths, dense = _encoder_files(encoder), read_card(encoder).dense
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, target / path.name)
    for name in dense:
        copy_dense(encoder / name, target / name)


def check_config(config: EncodeConfig) -> None:
    """Raise ConfigError for a format that is none, and for encoders that are not for their texts."""
    try:
        config.passage_format.format(title="", text="", contents="")
    except (KeyError, IndexError, ValueError) as error:
        expected = "expected text with fields {title} {text} {contents}"
        raise ConfigError(f"passage_format: found {config.passage_format!r} ({error}), {expected}") from error
    _check_sides(config)


def _check_sides(config: EncodeConfig) -> None:
    """The halves of a DPR model are two models: neither is of use for the other's texts."""
    of_passages = read_card(Path(config.encoder)).dpr
    of_queries = of_passages if config.query_encoder is None else read_card(Path(config.query_encoder)).dpr
    if of_passages == "question":
        raise ConfigError(
            f"encoder: found a DPRQuestionEncoder at {config.encoder}, expected one of passages: give the"
            " DPRContextEncoder, and this one as query_encoder"
        )
    if of_queries == "passage":
        found = (
            "nothing" if config.query_encoder is None else f"a DPRContextEncoder at {config.query_encoder}"
        )
        raise ConfigError(
            f"query_encoder: found {found}, expected the DPRQuestionEncoder that was trained with"
            f" {config.encoder}"
        )


def encoder_settings(config: EncodeConfig) -> EncoderSettings:
    """The part of the configuration that a query must share with the passages, what it leaves open filled
    in. Raises DataError for an encoder that makes its vectors in a way we do not."""
    card = read_card(Path(config.encoder))
    if config.query_encoder is not None:
        card = dataclasses.replace(card, query_prefix=read_card(Path(config.query_encoder)).query_prefix)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(EncoderSettings)}
    known = {
        name: value for name, value in dataclasses.asdict(card).items() if value is not None and name in given
    }
    usual = {
        "pooling": "mean",
        "query_prefix": "",
        "normalize": True,
        "max_tokens": min(256, card.positions or 256),
    }
    return EncoderSettings(
        **usual | known | {name: value for name, value in given.items() if value is not None}
    )


def _run(tasks: Sequence[_Task]) -> None:
    if len(tasks) == 1:
        encode_shards(tasks[0])
        return
    processes = [
        multiprocessing.get_context("spawn").Process(target=_encode_beside, args=(task,)) for task in tasks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [task.device for task, process in zip(tasks, processes, strict=True) if process.exitcode]
    if failed:
        raise DataError(
            f"encoding on {', '.join(failed)} failed, see above; start it again: finished shards are kept"
        )


def _encode_beside(task: _Task) -> None:
    """One of several processes: it takes its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // len(task.config.devices)))
    encode_shards(task)


def encode_shards(task: _Task) -> None:
    """Write this process's missing shards, each under a temporary name that is then renamed."""
    config = task.config
    table = PassageTable(Path(config.passages))
    encoder = Encoder(
        task.directory / passage_encoder(config), encoder_settings(config), choose_device(task.device)
    )
    num_shards = -(-len(table) // config.rows_per_shard)
    started, num_done = time.monotonic(), 0
    for number in range(task.start, num_shards, task.step):
        path = task.directory / f"vectors-{number:05d}.npy"
        if path.exists():
            continue
        start = number * config.rows_per_shard
        batches = table.batches(start, min(start + config.rows_per_shard, len(table)))
        rows = [row for batch in batches for row in from_batch(batch)]
        vectors = encoder.encode([format_passage(config.passage_format, row) for row in rows]).astype(
            np.float16
        )
        if not np.isfinite(vectors).all():
            raise DataError(
                f"shard {number}: the encoder gave NaN or values beyond float16; use dtype float32 or"
                " normalize"
            )
        write_shard(path, vectors)
        num_done += len(rows)
        rate = num_done / (time.monotonic() - started)
        log.info("%s: shard %d of %d, %.1f passages a second", task.device, number + 1, num_shards, rate)


def format_passage(passage_format: str, passage: SourcedPassage) -> str:
    """The text of a passage that is encoded."""
    return passage_format.format(title=passage.title, text=passage.text, contents=join_contents(passage))


def write_shard(path: Path, vectors: np.ndarray) -> None:
    """A whole shard, or none of that name."""
    with whole_file(path, writer=str(os.getpid())) as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)


def seal_vectors(
    partial: Path, config: EncodeConfig, table: PassageTable, taken_from: Mapping[str, Any] | None = None
) -> str:
    """Write the manifest, and remove what is no longer needed; the plan last, without which no shard would
    be believed."""
    for path in partial.glob(".vectors-*"):
        path.unlink()
    first = np.load(partial / "vectors-00000.npy", mmap_mode="r", allow_pickle=False)
    manifest = Manifest(
        kind="vectors",
        num_passages=len(table),
        licenses=table.manifest.licenses,
        sources=table.manifest.sources,
        settings={
            "encoder": dataclasses.asdict(encoder_settings(config)),
            "vectors": {"dim": first.shape[1], "dtype": "float16", "rows_per_shard": config.rows_per_shard},
            **({} if taken_from is None else {"taken_from": dict(taken_from)}),
        },
        made_from={"passages": table.version},
        versions={name: version(name) for name in ("numpy", "torch", "transformers")},
        files={name: entry for name, entry in file_entries(partial).items() if name.startswith(_SEALED)},
    )
    vectors_version = write_manifest(partial, manifest)
    (partial / PLAN_NAME).unlink()
    return vectors_version
