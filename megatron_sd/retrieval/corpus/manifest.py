"""The manifest of a prepared directory: what it holds, how it was made, and a checksum of every file.

    passages    numbered Parquet shards, from `sd-search data import` and `chunk`
    vectors     numbered float16 shards and their encoder, from `sd-search data encode`
    corpus      what a retriever opens: passages.arrow, bm25/*, dense/*, from `sd-search data index`

`manifest.json` is written last; the SHA-256 of its bytes is the version. FAISS and NumPy accept a flipped
bit silently, so every file is checked against the manifest before it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import xxhash

from megatron_sd.durable.files import write_whole
from megatron_sd.errors import DataError

Kind = Literal["passages", "vectors", "corpus"]
FORMAT = "megatron_sd 2"
MANIFEST_NAME = "manifest.json"
MADE_BY: Mapping[Kind, str] = {"passages": "import", "vectors": "encode", "corpus": "index"}
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its size and the hexadecimal XXH3-128 of its content."""

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory holds. `files` maps a relative POSIX path to its entry, `settings` a part (bm25,
    dense, chunks, encoder) to what made it, `made_from` the kind of an input directory to its version."""

    kind: Kind
    num_passages: int
    licenses: tuple[str, ...]
    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    made_from: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: str = FORMAT


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file, read in blocks of 4 MiB."""
    digest = xxhash.xxh3_128()
    num_bytes = 0
    with open(path, "rb") as handle:
        while block := handle.read(_READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileEntry(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def files_version(directory: Path, suffixes: Sequence[str]) -> str:
    """A hash of the names and contents of the files of a directory that end so."""
    entries = {
        file.name: file_entry(file).xxh3_128
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix in suffixes
    }
    return xxhash.xxh3_128(json.dumps(entries).encode()).hexdigest()


def file_entries(directory: Path) -> dict[str, FileEntry]:
    """An entry for every file below a directory, by relative path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_entry(path) for path in paths}


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write manifest.json and return the version."""
    content = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False).encode()
    write_whole(directory / MANIFEST_NAME, content)
    return hashlib.sha256(content).hexdigest()


def read_manifest(directory: Path, kind: Kind | None = None) -> tuple[Manifest, str]:
    """The manifest and the version, without looking at the other files. Raises DataError, also for another
    kind."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{directory} is not a {kind or 'prepared'} directory: found no {MANIFEST_NAME}, which is written"
            f" last; make one with `sd-search data {MADE_BY[kind or 'corpus']}`"
        )
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise DataError(
                f"{path} has format {fields['format']!r}, expected {FORMAT!r}: build it again from its"
                " passages"
            )
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        lists = {name: tuple(fields.pop(name)) for name in ("licenses", "sources")}
        manifest = Manifest(files=files, **lists, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is corrupt ({error}): copy or build the {kind or 'corpus'} again") from error
    if kind not in (None, manifest.kind):
        raise DataError(
            f"{directory} holds {manifest.kind}, expected {kind}; make it with `sd-search data"
            f" {MADE_BY[kind]}`"
        )
    return manifest, hashlib.sha256(content).hexdigest()


def verify_files(
    directory: Path,
    manifest: Manifest,
    required: Iterable[str],
    progress: Callable[[str], None] | None = None,
) -> None:
    """Check every file of the manifest, and that it lists the `required` ones. Raises DataError that names
    the file.

    progress: called with a line before each file.
    """
    missing = sorted(set(required) - set(manifest.files))
    if missing:
        raise DataError(
            f"{directory / MANIFEST_NAME} does not list {missing[0]}: build the {manifest.kind} again"
        )
    for number, (name, expected) in enumerate(sorted(manifest.files.items()), start=1):
        if progress is not None:
            progress(
                f"verifying file {number} of {len(manifest.files)}: {name},"
                f" {expected.num_bytes / 2**20:,.1f} MiB"
            )
        _verify_file(directory, name, expected)


def _verify_file(directory: Path, name: str, expected: FileEntry) -> None:
    path = directory / name
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(directory.resolve()):
        raise DataError(
            f"{directory / MANIFEST_NAME} names {name!r}, which lies outside its directory: refused"
        )
    again = "copy or build it again"
    if not path.exists():
        raise DataError(f"{path} is missing, but {MANIFEST_NAME} lists it: {again}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is no regular file, but {MANIFEST_NAME} lists it: {again}")
    if status.st_size != expected.num_bytes:
        raise DataError(
            f"{path} has {status.st_size} bytes, expected {expected.num_bytes}: the file is truncated or was"
            f" changed; {again}"
        )
    if file_entry(path).xxh3_128 != expected.xxh3_128:
        raise DataError(f"{path} does not match its checksum in {MANIFEST_NAME}: {again}")


def open_manifest(
    directory: Path,
    kind: Kind | None,
    required: Iterable[str] = (),
    progress: Callable[[str], None] | None = None,
) -> tuple[Manifest, str]:
    """The verified manifest and the version. Raises DataError that names the file that is missing or
    damaged."""
    manifest, version = read_manifest(directory, kind)
    verify_files(directory, manifest, required, progress)
    return manifest, version
