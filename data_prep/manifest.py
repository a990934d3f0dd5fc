"""`sd-search data info`: what a corpus directory holds, and whether its files are whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sd.retrieval.manifest import Manifest, open_manifest


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Which corpus directory to describe."""

    corpus: str


def corpus_info(config: InfoConfig) -> str:
    """Verify every file and describe the corpus in a few lines. Raises DataError that names a missing or damaged file."""
    manifest, version = open_manifest(Path(config.corpus), required=())
    return render_info(manifest, version)


def render_info(manifest: Manifest, version: str) -> str:
    """The manifest as readable lines."""
    total_mib = sum(entry.num_bytes for entry in manifest.files.values()) / 2**20
    return "\n".join(
        [
            f"corpus version  {version}",
            f"passages        {manifest.num_passages:,} ({manifest.num_terms:,} distinct terms)",
            f"files           {len(manifest.files)}, {total_mib:,.1f} MiB, all checksums right",
            f"sources         {', '.join(manifest.sources) or 'not stated'}",
            f"licences        {', '.join(manifest.licenses) or 'not stated'}",
            f"index           {', '.join(f'{name} {value}' for name, value in sorted(manifest.settings.items()))}",
            f"built with      {', '.join(f'{name} {value}' for name, value in sorted(manifest.versions.items()))}",
        ]
    )
