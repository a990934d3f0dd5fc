"""What one node says of itself before a run: software, GPUs, room. Reading only; judged by
launch/doctor/checks.py."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cluster.provenance import describe_software
from megatron_sd.durable.files import write_whole

COMPARED_PACKAGES = (
    "megatron-sd",
    "torch",
    "deepspeed",
    "transformers",
    "vllm",
    "faiss-cpu",
    "flash-attn",
    "numpy",
)
GPU_FIELDS = (
    "name",
    "uuid",
    "memory.total",
    "driver_version",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
READY_S = 10.0


def node_facts(run_dir: Path) -> dict[str, Any]:
    """JSON values by name. run_dir: its file system is the one that must have room."""
    return {
        "versions": versions(),
        "commit": describe_software({})["git.txt"].splitlines()[0],
        "gpus": gpus(),
        "cuda": torch_cuda(),
        "free_gib": {
            str(path): shutil.disk_usage(path).free / 2**30 for path in (_existing(run_dir), Path("/dev/shm"))
        },
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def versions() -> dict[str, str]:
    """Python and the packages that must agree between nodes; "" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in COMPARED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def torch_cuda() -> str:
    """The CUDA that torch was built for, such as 13.0; "" for a CPU build, or without torch."""
    try:
        from torch.version import cuda
    except ImportError:
        return ""
    return cuda or ""


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [
        dict(zip(GPU_FIELDS, (value.strip() for value in line.split(","))))
        for line in done.stdout.splitlines()
    ]


def unready_servers(urls: Sequence[str]) -> list[str]:
    """`URL: reason` of each retriever that does not say it is ready."""
    problems = []
    for url in urls:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/readyz", timeout=READY_S):
                pass
        except (urllib.error.URLError, OSError, ValueError) as error:
            problems.append(f"{url}: {getattr(error, 'reason', error)}")
    return problems


def write_canary(directory: Path, number: int, nonce: str) -> None:
    """A file that every other node must see as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / f"canary-{number}", nonce)


def unseen_canaries(directory: Path, nonces: Sequence[str | None]) -> list[int]:
    """Numbers of the nodes whose file is not here, or reads otherwise than they wrote it."""
    unseen = []
    for number, nonce in enumerate(nonces):
        path = directory / f"canary-{number}"
        try:
            found = path.read_text(encoding="utf-8")
        except OSError:
            found = None
        if nonce is not None and found != nonce:
            unseen.append(number)
    return unseen


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return path if path.exists() or path == path.parent else _existing(path.parent)
