"""`sd-search data build`: one file or folder of passages to a corpus that can be searched.

    OUTPUT/passages   `sd-search data import`
    OUTPUT/vectors    `sd-search data encode`, with an encoder
    OUTPUT/corpus     `sd-search data index`

What it will take is said before it begins. A part that is there is passed over; one that was killed goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.index_sizes import IndexSizesConfig, estimates, passages_gb, text_gb, vectors_gb
from data_prep.passages.sourced import SourcedPassage
from data_prep.sources.jsonl import COMPRESSED, RowError
from data_prep.sources.passage_rows import parse_passage
from data_prep.sources.questions import ImportConfig, import_file
from data_prep.sources.rows import read_rows
from data_prep.vectors.encode import (
    EncodeConfig,
    check_config,
    encode_passages,
    encoder_settings,
    format_passage,
)
from data_prep.vectors.vector_index import VectorIndexConfig
from megatron_sd.durable.files import write_whole
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.encoder import Encoder, choose_device

PLAN_NAME = "build.json"
SAMPLED_ROWS, ENCODED_ROWS = 5_000, 128
LOOKED_AT_BYTES = 1 << 20  # of each end of a file
IMPORTED_PER_S = 7_000  # passages a second: 61,377 took 8.5 processor seconds, the start included
COMPRESSION = 3.0  # of text: Wikipedia passages by gzip 2.6, by zstd 3.9
NOT_OF_THE_CORPUS = ("output", "devices", "dry_run", "serve", "port")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build. encoder: a local Hugging Face directory, None for BM25 alone; its options are those of
    `data encode`, and for E5 query_prefix "query: ", passage_format "passage: {contents}"."""

    input: str  # a file or folder of passages, such as wiki-18.jsonl.gz
    output: str  # a directory for all parts; the same command goes on there
    source: str = ""  # of rows that name none
    license: str = ""  # of rows that name none: an SPDX identifier
    encoder: str | None = None
    query_prefix: str | None = None  # None: as the encoder's files say
    passage_format: str = "{contents}"  # fields: {title} {text} {contents}
    devices: tuple[str, ...] = ("auto",)  # that encode, one process each
    vector_index: VectorIndexConfig = field(default_factory=VectorIndexConfig)
    dry_run: bool = False  # say what it takes, and end
    serve: bool = False  # and then serve it on this machine, until it is told to stop
    port: int = 8741  # of the service


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a build will take, estimated from its first rows: passages; words of one; numbers of a vector (0
    without an encoder) and passages encoded a second; GB of disk while it is built, and of memory that
    searches want; hours."""

    passages: float
    words: float
    dim: int
    encoded_per_s: float
    disk_gb: float
    ram_gb: float
    hours: float

    def lines(self) -> list[str]:
        """For a person."""
        encoding = (
            f", vectors of {self.dim} numbers at {self.encoded_per_s:,.1f} passages a second here"
            if self.dim
            else ""
        )
        return [
            f"about {self.passages:,.0f} passages of {self.words:.0f} words{encoding}",
            f"disk {self.disk_gb:,.1f} GB while it is built; memory for fast searches {self.ram_gb:,.1f} GB",
            f"about {self.hours:,.1f} hours",
        ]


def build(config: BuildConfig, say: Callable[[str], None]) -> Path | None:
    """The corpus directory; None after a dry run. Raises ConfigError for a disk without the room, DataError
    for input that cannot be read, and for an output that was begun from something else."""
    output, corpus = Path(config.output), Path(config.output) / "corpus"
    if corpus.exists() and not config.dry_run:
        _begin(output, config)
        return corpus
    for line in (found := forecast(config)).lines():
        say(line)
    _refuse_small_disk(output, found)
    if config.dry_run:
        return None
    _begin(output, config)
    passages, vectors = output / "passages", output / "vectors"
    if not passages.exists():
        labels = {"source": config.source, "license": config.license}
        import_file(ImportConfig(kind="passages", input=config.input, output=str(passages), **labels))
    if config.encoder is not None and not vectors.exists():
        encode_passages(_encode_config(config))
    build_index(
        IndexConfig(
            passages=str(passages),
            output=str(corpus),
            vectors=None if config.encoder is None else str(vectors),
            vector_index=config.vector_index,
        )
    )
    return corpus


def forecast(config: BuildConfig) -> Forecast:
    """Read the first rows, encode some of them, and scale. Raises DataError for input without passages."""
    path = Path(config.input)
    sample = list(itertools.islice(_passages(path), SAMPLED_ROWS))
    if not sample:
        raise DataError(f"input: found no passage in {path}, expected rows with an id and a text")
    words = sum(len(f"{own.title} {own.text}".split()) for own in sample) / len(sample)
    total = float(len(sample))
    if len(sample) == SAMPLED_ROWS:
        row_bytes = sum(len(json.dumps(vars(own), ensure_ascii=False).encode()) for own in sample) / len(
            sample
        )
        total = max(total, _text_bytes(path) / row_bytes)
    dim, encoded_per_s = (0, 0.0) if config.encoder is None else _measure_encoder(config, sample)
    sizes = IndexSizesConfig(
        passages=total,
        dim=dim or 1,
        words_per_passage=max(1, round(words)),
        cores=os.cpu_count() or 1,
        encoded_per_s=encoded_per_s or 1.0,
    )
    bm25, *dense = estimates(sizes)
    vectors = [own for own in dense if own.name == config.vector_index.kind and dim]
    # each estimate counts the text, which lies in memory once
    ram_gb = bm25.ram_gb + sum(own.ram_gb - text_gb(sizes) for own in vectors)
    encoding_h = total / encoded_per_s / 3600 if dim else 0.0
    return Forecast(
        passages=total,
        words=words,
        dim=dim,
        encoded_per_s=encoded_per_s,
        disk_gb=2 * passages_gb(sizes) + (vectors_gb(sizes) if dim else 0.0) + ram_gb,
        ram_gb=ram_gb,
        hours=total / IMPORTED_PER_S / 3600 + encoding_h + sum(own.build_hours for own in (bm25, *vectors)),
    )


def _passages(path: Path) -> Iterator[Passage]:
    """The rows that are passages."""
    for _, row in read_rows(path):
        with contextlib.suppress(RowError):
            if not isinstance(row, RowError):
                yield parse_passage(row)


def _text_bytes(path: Path) -> float:
    """Of all files, about, as text."""
    files = [path] if path.is_file() else [own for own in path.rglob("*") if own.is_file()]
    return sum(
        own.stat().st_size * (COMPRESSION if own.suffix in (*COMPRESSED, ".parquet") else 1.0)
        for own in files
    )


def _measure_encoder(config: BuildConfig, sample: Sequence[Passage]) -> tuple[int, float]:
    """(numbers of a vector, passages a second over all devices), measured on the first one."""
    own = _encode_config(config)
    check_config(own)
    encoder = Encoder(config.encoder or "", encoder_settings(own), choose_device(config.devices[0]))
    texts = [format_passage(config.passage_format, SourcedPassage(**vars(p))) for p in sample[:ENCODED_ROWS]]
    encoder.encode(texts[:8])
    started = time.perf_counter()
    encoder.encode(texts)
    return encoder.dim, len(texts) / (time.perf_counter() - started) * len(config.devices)


def _encode_config(config: BuildConfig) -> EncodeConfig:
    return EncodeConfig(
        passages=f"{config.output}/passages",
        encoder=config.encoder or "",
        output=f"{config.output}/vectors",
        query_prefix=config.query_prefix,
        passage_format=config.passage_format,
        devices=config.devices,
    )


def _begin(output: Path, config: BuildConfig) -> None:
    """Note what the parts are made from, or check that they were made from the same."""
    told = dataclasses.asdict(config)
    begun = {name: value for name, value in told.items() if name not in NOT_OF_THE_CORPUS}
    begun["contents"] = {
        name: _contents(Path(path))
        for name, path in (("input", config.input), ("encoder", config.encoder))
        if path
    }
    text = json.dumps(begun, indent=1) + "\n"
    plan = output / PLAN_NAME
    if plan.exists() and plan.read_text(encoding="utf-8") != text:
        then = json.loads(plan.read_text(encoding="utf-8"))
        other = sorted(name for name in begun if json.loads(text)[name] != then.get(name))
        raise DataError(
            f"{output} was begun with another {', '.join(other)} ({plan}): choose another output, or remove it"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_whole(plan, text)


def _contents(path: Path) -> str:
    """Of the sizes of all files and of what they begin and end with: a changed corpus is told without reading all
    of it."""
    digest = xxhash.xxh3_128()
    for own in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        size = own.stat().st_size
        name = own.name if own == path else own.relative_to(path)
        digest.update(f"{name} {size}\n".encode())
        with open(own, "rb") as handle:
            digest.update(handle.read(LOOKED_AT_BYTES))
            handle.seek(max(0, size - LOOKED_AT_BYTES))
            digest.update(handle.read())
    return digest.hexdigest()


def _refuse_small_disk(output: Path, found: Forecast) -> None:
    """Raise ConfigError when what is missing yet does not fit the disk."""
    there = next(own for own in (output, *output.absolute().parents) if own.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    held_gb = sum(own.stat().st_size for own in output.rglob("*") if own.is_file()) / 1e9
    if found.disk_gb - held_gb > free_gb:
        raise ConfigError(
            f"output: found {free_gb:,.1f} GB free below {there}, expected about {found.disk_gb - held_gb:,.1f}: choose"
            " another disk, or a smaller vector_index.kind"
        )
