"""`sd-search data info` and `verify`: what a prepared directory holds, and whether its files are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sd.retrieval.corpus.manifest import Manifest, open_manifest


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Which directory (passages, vectors or corpus) to describe."""

    path: str  # of passages, vectors or a corpus


def verify_directory(config: InfoConfig, say: Callable[[str], None]) -> None:
    """Check every file, telling `say` about each. Raises DataError that names a missing or damaged one."""
    manifest, version = open_manifest(Path(config.path), None, progress=say)
    say(f"{manifest.kind} version {version}: all {len(manifest.files)} files are whole")


def corpus_info(config: InfoConfig) -> str:
    """Verify every file and describe the directory in a few lines. Raises DataError that names a missing or
    damaged file."""
    manifest, version = open_manifest(Path(config.path), None)
    return render_info(manifest, version)


def render_info(manifest: Manifest, version: str) -> str:
    """The manifest as readable lines."""
    total_mib = sum(entry.num_bytes for entry in manifest.files.values()) / 2**20
    settings = [f"{part:<15} {_words(values)}" for part, values in sorted(manifest.settings.items())]
    made_from = [f"made from       {kind} {version}" for kind, version in sorted(manifest.made_from.items())]
    return "\n".join(
        [
            f"{manifest.kind + ' version':<15} {version}",
            f"passages        {manifest.num_passages:,}",
            f"files           {len(manifest.files)}, {total_mib:,.1f} MiB, all checksums right",
            f"sources         {', '.join(manifest.sources) or 'not stated'}",
            f"licences        {', '.join(manifest.licenses) or 'not stated'}",
            *settings,
            *made_from,
            f"built with      {_words(manifest.versions)}",
        ]
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
