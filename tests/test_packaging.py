"""What a wheel holds and what a newcomer types."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sd.observability.sinks.table import SERVICES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built from the files of this checkout (setuptools alone, nothing downloaded)."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    source = out / "source"
    ignored = {".git", ".venv", "build", "dist", "runs", "data"}
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        if path.is_file() and relative.parts[0] not in ignored and "__pycache__" not in relative.parts:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_holds_the_packages_and_their_data(wheel):
    names = set(wheel.namelist())
    for package in ("megatron_sd", "data_prep", "eval", "launch"):
        for path in (ROOT / package).rglob("*"):
            is_source = (
                path.suffix in (".py", ".yaml", ".sbatch", ".css", ".js")
                or path.parent.name == "coldstart_model"
            )
            if path.is_file() and is_source and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"megatron_sd", "data_prep", "eval", "launch", "megatron_sd-0.1.0.dist-info"}


@pytest.mark.slow
def test_wheel_declares_command_licence_and_extras(wheel):
    meta = wheel.read("megatron_sd-0.1.0.dist-info/METADATA").decode()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", meta, re.M)
    assert (
        "sd-search = launch.cli:main" in wheel.read("megatron_sd-0.1.0.dist-info/entry_points.txt").decode()
    )
    extras = set(re.findall(r"^Provides-Extra: (\S+)", meta, re.M))
    assert {"vllm", "retriever-gpu-cu12", "retriever-gpu-cu13", "dev", *SERVICES, "sinks"} <= extras
    base = {name.lower() for name in re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", meta, re.M)}
    assert {"torch", "deepspeed", "transformers", "datasets", "tensorboard", "faiss-cpu"} <= base


def test_every_make_target_expands():
    for target in ("demo", "test", "bench", "lint", "wheel"):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
