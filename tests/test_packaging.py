"""What a wheel holds and what a newcomer types."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sd.observability.metrics_log import read_metrics
from megatron_sd.observability.sinks.table import SERVICES
from megatron_sd.ops.native import cpu_library
from tests.whole_runs.test_own_functions import files_of_the_page

ROOT = Path(__file__).resolve().parent.parent
HAS_COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the files of this checkout (setuptools alone, nothing downloaded), the C++ library compiled
    anew; tests/ops/test_cuda_build.py compiles for GPUs."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    source = out / "source"
    ignored = {".git", ".venv", "build", "dist", "runs", "data"}
    for path in ROOT.rglob("*"):
        relative = path.relative_to(ROOT)
        is_made = path.suffix == ".so" or "__pycache__" in relative.parts
        if path.is_file() and relative.parts[0] not in ignored and not is_made:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).symlink_to(path)
    own = os.environ | {"MEGATRON_SD_CUDA": "0"}
    command = [sys.executable, "-c", build, str(out)]
    done = subprocess.run(command, cwd=source, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel is unpacked, as pip does; what it needs is where it is for these tests."""
    place = tmp_path_factory.mktemp("installed")
    wheel.extractall(place)
    return place


def command(installed, folder, *words):
    """`sd-search` of the wheel, in a folder of the user's."""
    own = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", *words],
        cwd=folder,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
def test_a_compiler_is_all_it_takes(installed):
    path = installed / "megatron_sd/_C.so"
    library, missing = cpu_library.load(path)
    assert (
        missing == "" and library.megatron_sd_instruction_set() in range(3) and library.megatron_sd_compiler()
    )
    needed = path.read_bytes()
    assert b"libtorch" not in needed and b"libpython" not in needed


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


@pytest.mark.slow
def test_five_files_of_a_user_work_with_the_wheel_and_no_checkout(installed, tmp_path):
    for name, source in files_of_the_page():
        (tmp_path / name).write_text(source, encoding="utf-8")
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import megatron_sd; print(megatron_sd.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(installed))
    command(
        installed, tmp_path, "world", "--output=world", "--num_train_questions=40", "--num_eval_questions=10"
    )
    command(
        installed,
        tmp_path,
        "train",
        f"--config={installed}/launch/configs/world.yaml",
        f"--model.path={installed}/data_prep/coldstart_model",
        "--run_dir=run",
        "--data.train=world/questions.jsonl",
        "--num_steps=2",
        "--rollout.questions_per_step=4",
        "--log.eval_every=0",
        "--log.transcripts_every=1",
        "--retriever.corpus=null",
        "--retriever.function=lookup.py:search",
        "--reward.own={thrift: habits.py:thrift}",
        "--advantage.terms={reward: 1.0, thrift: 0.1}",
        "--distill.gate=hard.py:hard",
        "--protocol.preset=brackets.py:brackets",
        '--protocol.tools=[{name: days, function: "days.py:days", description: "You can count days."}]',
    )
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert list(steps) == [1, 2] and all(0 < metrics["reward/thrift"] <= 1 for metrics in steps.values())
    assert "You can count days." in (tmp_path / "run" / "transcripts" / "step_00000001.txt").read_text()


def test_every_make_target_expands():
    for target in ("demo", "test", "bench", "lint", "wheel"):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
