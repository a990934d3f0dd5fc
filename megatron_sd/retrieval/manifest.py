"""The manifest of a corpus directory: what it holds, how it was made, and a checksum of every file.

A corpus directory is

    passages.arrow        id, title, text; rows in id order
    bm25/*                the BM25 index (bm25.py)
    manifest.json         written last; the SHA-256 of its bytes is the corpus version

FAISS and NumPy accept a flipped bit silently, so every file is checked against the manifest before it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from megatron_sd.errors import DataError

FORMAT = "megatron_sd corpus 1"
MANIFEST_NAME = "manifest.json"
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the corpus: its size and the hexadecimal XXH3-128 of its content."""

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus directory holds. `files` maps a relative POSIX path to its entry; `settings` are those of the index."""

    num_passages: int
    num_terms: int
    licenses: tuple[str, ...]
    sources: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
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


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write manifest.json (temporary name, fsync, rename) and return the corpus version."""
    content = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False).encode()
    temporary = directory / (MANIFEST_NAME + ".tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, directory / MANIFEST_NAME)
    return hashlib.sha256(content).hexdigest()


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest and the corpus version, without looking at the other files. Raises DataError."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{directory} is not a corpus directory: found no {MANIFEST_NAME}, which is written last; "
            "build the corpus with `sd-search data index`"
        )
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise DataError(f"{path} has format {fields['format']!r}, expected {FORMAT!r}: build the corpus again")
        files = {name: FileEntry(**entry) for name, entry in fields.pop("files").items()}
        lists = {name: tuple(fields.pop(name)) for name in ("licenses", "sources")}
        manifest = Manifest(files=files, **lists, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is corrupt ({error}): copy or build the corpus again") from error
    return manifest, hashlib.sha256(content).hexdigest()


def verify_files(directory: Path, manifest: Manifest, required: Iterable[str]) -> None:
    """Check every file of the manifest, and that it lists the `required` ones. Raises DataError that names the file."""
    missing = sorted(set(required) - set(manifest.files))
    if missing:
        raise DataError(f"{directory / MANIFEST_NAME} does not list {missing[0]}: build the corpus again")
    for name, expected in sorted(manifest.files.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{directory / MANIFEST_NAME} names {name!r}, which lies outside the corpus directory: refused")
        path = directory / name
        if not path.is_file():
            raise DataError(f"{path} is missing, but {MANIFEST_NAME} lists it: copy or build the corpus again")
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            raise DataError(
                f"{path} has {num_bytes} bytes, expected {expected.num_bytes}: the file is truncated or was changed; "
                "copy or build the corpus again"
            )
        if file_entry(path).xxh3_128 != expected.xxh3_128:
            raise DataError(f"{path} does not match its checksum in {MANIFEST_NAME}: copy or build the corpus again")


def open_manifest(directory: Path, required: Iterable[str]) -> tuple[Manifest, str]:
    """The verified manifest and the corpus version. Raises DataError that names the file that is missing or damaged."""
    manifest, version = read_manifest(directory)
    verify_files(directory, manifest, required)
    return manifest, version
