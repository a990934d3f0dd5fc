"""`sd-search --version`: what is installed here, as a report of a problem should begin."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Sequence

from launch.cluster.provenance import checkout
from megatron_sd.errors import ConfigError

PACKAGES = ("torch", "deepspeed", "transformers", "vllm")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if argv:
        raise ConfigError(f"version: found {argv[0]!r} after it, expected nothing")
    print("\n".join(lines()))


def lines() -> list[str]:
    """One line a fact."""
    return [
        f"sd-search    {installed('megatron-sd')}",
        f"commit       {commit()}",
        f"python       {platform.python_version()}",
        *(f"{name:<12} {installed(name)}" for name in PACKAGES),
        f"kernels      {kernels()}",
    ]


def installed(package: str) -> str:
    """Its version, read without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of the checkout that this code runs from, with a word where there are local changes."""
    found, changes = checkout()
    if not re.fullmatch(r"[0-9a-f]{40}\n", found):
        return "not a checkout"
    return f"{found.strip()}{' with local changes' if changes.strip() else ''}"


def kernels() -> str:
    """Which native libraries were loaded, and why another was not."""
    from megatron_sd.ops.native.cpu_library import build_info

    info = build_info()
    cpu = f"CPU {info.instruction_set}" if info.library else f"CPU by torch ({info.missing})"
    cuda = f"CUDA {info.cuda_architectures}" if info.cuda_library else f"CUDA by torch ({info.cuda_missing})"
    return f"{cpu}; {cuda}"
