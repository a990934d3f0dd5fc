"""Directories that exist whole or not at all: written under a temporary name, checksummed, renamed.

    step_00000040.tmp/...            while it is being written or removed; removed by the next save
    step_00000040/manifest.json      written last, before the directory is renamed: size and SHA-256 of every file, and its own
    step_00000040.broken/            found not to verify on load; kept for a look, never read
    latest                           the newest one's name, for people and scripts; nothing here believes it

Nothing here knows what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_sd.durable.files import sync_directory, write_whole

MANIFEST = "manifest.json"
LATEST = "latest"
READ_BYTES = 1 << 22

Seal = dict[str, int | str]  # {"bytes", "sha256"} of a file
Seals = dict[str, Seal]  # by path relative to the directory


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


def seal(directory: Path, known: Iterable[str] = ()) -> Seals:
    """Size and checksum of every file but those of `known` names, whose writers have sealed them."""
    names = {str(path.relative_to(directory)): path for path in files_under(directory)}
    return {
        name: {"bytes": names[name].stat().st_size, "sha256": sha256(names[name])}
        for name in names.keys() - set(known)
    }


def commit(staging: Path, directory: Path, seals: Seals) -> None:
    """Write the manifest and give the directory its name; after this returns a power cut cannot undo it."""
    write_whole(staging / MANIFEST, _manifest_text(seals))
    for path in [*(p for p in staging.rglob("*") if p.is_dir()), staging]:
        sync_directory(path)
    os.rename(staging, directory)
    sync_directory(directory.parent)


def point_to(directory: Path) -> None:
    """Let `latest` name a committed directory: by replacing it, so that a reader finds the old name or the
    new one."""
    latest = directory.with_name(LATEST)
    write_whole(latest, directory.name + "\n")
    sync_directory(directory.parent)


def find_damage(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a committed directory (checking only this share of its files), or None. Any
    changed bit is found, in the manifest too, and any file that was not there when it was written."""
    try:
        text = (directory / MANIFEST).read_bytes()
        seals: Seals = json.loads(text)["files"]
        if _manifest_text(seals).encode() != text:
            return f"{MANIFEST} does not match its own checksum"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    strangers = {str(path.relative_to(directory)) for path in files_under(directory)} - seals.keys()
    if strangers:
        return f"{min(strangers)} is not in {MANIFEST}"
    damage = (_damage_of(directory / name, name, seals[name]) for name in sorted(seals)[share[0] :: share[1]])
    return next((found for found in damage if found is not None), None)


def set_aside(directory: Path) -> Path:
    """Rename a damaged directory so that it is not found again."""
    broken = directory.with_name(directory.name + ".broken")
    shutil.rmtree(broken, ignore_errors=True)
    os.rename(directory, broken)
    return broken


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` committed directories; one that is removed in part has lost its name
    before."""
    for directory in committed(root)[keep:]:
        os.rename(directory, staging_of(directory))
        shutil.rmtree(staging_of(directory))


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


def _damage_of(path: Path, name: str, expected: Mapping[str, int | str]) -> str | None:
    try:
        if not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        return None if sha256(path) == expected["sha256"] else f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error})"


def _manifest_text(seals: Seals) -> str:
    """The manifest, which also seals itself: there is one text for given seals."""
    digest = hashlib.sha256(json.dumps(seals, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": seals, "sha256": digest}, indent=1, sort_keys=True)
