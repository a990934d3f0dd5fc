"""What an attempt ran: commit and local changes, package versions, and the part of the environment that is
safe to keep."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
KEPT_VARIABLES = re.compile(r"(SLURM|NCCL|CUDA|OMP|DS|DEEPSPEED|TORCH|PYTORCH|VLLM|MEGATRON_SD|GLOO)_")
SECRET_WORDS = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def describe_software(environment: Mapping[str, str]) -> dict[str, str]:
    """File name -> text: git.txt and git.diff of the checkout this code runs from, packages.txt,
    environment.txt."""
    return {
        "git.txt": f"{_git('rev-parse', 'HEAD')}{_git('status', '--short', '--branch')}",
        "git.diff": _git("diff", "HEAD"),
        "packages.txt": packages(),
        "environment.txt": "".join(
            f"{name}={value}\n" for name, value in kept_environment(environment).items()
        ),
    }


def packages() -> str:
    """The interpreter, then `name==version` of every installed distribution."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return (
        f"# Python {platform.python_version()} at {sys.executable}\n"
        + "\n".join(sorted(found, key=str.lower))
        + "\n"
    )


def kept_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of SLURM, NCCL, CUDA and their like by name; none whose name sounds like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if KEPT_VARIABLES.match(name) and not SECRET_WORDS.search(name)
    }


def checkout() -> tuple[str, str]:
    """Commit and local changes of the checkout this code runs from, as git prints them; both empty where it
    is none."""
    if not (SOURCE / ".git").exists():  # a file in a worktree
        return "", ""
    return _git("rev-parse", "HEAD"), _git("status", "--short")


def _git(*arguments: str) -> str:
    """A git command's output; a line that says so where the code is no checkout, or git is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(SOURCE), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "no git on this machine\n"
    return done.stdout if done.returncode == 0 else f"no git checkout at {SOURCE}: {done.stderr.strip()}\n"
