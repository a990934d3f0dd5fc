"""Directories that exist whole or not at all: written under a temporary name, checksummed, renamed.

    step_00000040.tmp/...            while it is being written; removed by the next save
    step_00000040/manifest.json      written last, then the directory is renamed: size and SHA-256 of every other file
    step_00000040.broken/            found not to verify on load; kept for a look, never read

Nothing here knows what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22

Seals = dict[str, dict[str, int | str]]  # path relative to the directory -> {"bytes", "sha256"}


def directory_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is committed."""
    return root / f"step_{step:08d}"


def staging_of(directory: Path) -> Path:
    """Where it is being written."""
    return directory.with_name(directory.name + ".tmp")


def committed(root: Path) -> list[Path]:
    """Committed directories, newest step first, verified or not."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return [root / name for name in sorted(names, reverse=True) if re.fullmatch(r"step_\d{8}", name)]


def files_under(directory: Path) -> list[Path]:
    """Every file but the manifest, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def seal(directory: Path, share: tuple[int, int] = (0, 1)) -> Seals:
    """Flush files to disk and checksum them. share (i, n): every n-th file from the i-th on; n processes share the work."""
    seals: Seals = {}
    for path in files_under(directory)[share[0] :: share[1]]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        seals[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return seals


def commit(staging: Path, directory: Path, seals: Seals) -> None:
    """Write the manifest and give the directory its name; after this returns a power cut cannot undo it."""
    with (staging / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"files": seals}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for path in [*(p for p in staging.rglob("*") if p.is_dir()), staging]:
        sync_directory(path)
    os.rename(staging, directory)
    sync_directory(directory.parent)


def find_damage(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a committed directory (checking only this share of its files), or None."""
    try:
        seals: Seals = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name in sorted(seals)[share[0] :: share[1]]:
        path, expected = directory / name, seals[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} does not match its checksum"
    return None


def set_aside(directory: Path) -> Path:
    """Rename a damaged directory so that it is not found again."""
    broken = directory.with_name(directory.name + ".broken")
    shutil.rmtree(broken, ignore_errors=True)
    os.rename(directory, broken)
    return broken


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` committed directories."""
    for directory in committed(root)[keep:]:
        shutil.rmtree(directory)


def clear_staging(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in root.glob("step_*.tmp"):
        shutil.rmtree(path)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
