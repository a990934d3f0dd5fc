"""How the native library is found, and what is said without a compiler, or of a file that is missing or broken;
tests/test_packaging.py builds it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sd.errors import ConfigError
from megatron_sd.ops import build_info, jsd
from megatron_sd.ops.native import calls, cpu_library
from tests.ops.divergences import JSD

ROOT = Path(__file__).resolve().parents[2]


def build(out: Path, **environment: str) -> subprocess.CompletedProcess:
    """setup.py's build_ext alone, from a copy of what it needs."""
    shutil.copytree(ROOT / "kernels/csrc", out / "kernels/csrc")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, out / name)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib"]
    everything = os.environ | {"MEGATRON_SD_CUDA": "0"} | environment
    return subprocess.run(
        command, cwd=out, env=everything, capture_output=True, text=True, check=False, timeout=600
    )


def test_without_a_compiler_there_is_a_warning_and_no_library(tmp_path):
    done = build(
        tmp_path, CC="/no/such/cc", CXX="/no/such/c++", LDSHARED="/no/such/c++", LDCXXSHARED="/no/such/c++"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'building extension "megatron_sd._C" failed' in done.stdout + done.stderr
    assert not (tmp_path / "lib/megatron_sd/_C.so").exists()


def test_what_is_to_be_kept_is_not_compiled(tmp_path):
    done = build(tmp_path, MEGATRON_SD_NATIVE="keep")
    assert done.returncode == 0 and "megatron_sd._C is not compiled: MEGATRON_SD_NATIVE=keep" in done.stdout
    assert not (tmp_path / "lib/megatron_sd/_C.so").exists()


def test_a_missing_or_broken_file_is_explained(tmp_path):
    assert cpu_library.load(tmp_path / "_C.so") == (
        None,
        f"{tmp_path / '_C.so'} does not exist: install again with a C++ compiler at hand (pip install .)",
    )
    (tmp_path / "_C.so").write_text("no library")
    library, missing = cpu_library.load(tmp_path / "_C.so")
    assert library is None and "_C.so cannot be loaded: " in missing


def test_without_a_library_auto_is_the_reference_and_cpp_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_library, "LIBRARY", None)
    monkeypatch.setattr(cpu_library, "MISSING", "the file does not exist")
    assert build_info().library is None and build_info().missing == "the file does not exist"
    logits, rows = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.5]]), torch.tensor([0])
    teacher = logits.flip(0)
    values = [
        jsd.jsd_rows(logits, teacher, rows, rows, torch.ones(1), divergence=JSD, impl=i).values
        for i in ("auto", "torch")
    ]
    assert torch.equal(*values) and values[0].item() > 0.01
    with pytest.raises(ConfigError, match="impl='cpp' is not part of this build, .* the file does not exist"):
        jsd.jsd_rows(logits, logits, rows, rows, torch.ones(1), divergence=JSD, impl="cpp")


@pytest.mark.skipif(cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}")
def test_a_newer_instruction_set_than_the_processors_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_library, "INSTRUCTION_SET", "baseline")
    logits, rows = torch.zeros(1, 3), torch.tensor([0])
    options = {"divergence": JSD, "with_gradient": False}
    with pytest.raises(
        ValueError, match="instruction_set is 'avx2', expected at most 'baseline' on this processor"
    ):
        calls.native_divergence(logits, logits, rows, rows, instruction_set="avx2", **options)


def test_the_operations_need_torch_alone():
    """A machine for kernels only has nothing else."""
    program = (
        "import sys\nfor name in ('deepspeed', 'transformers', 'datasets', 'bm25s', 'numba', 'faiss',"
        " 'jsonargparse', 'yaml', 'tqdm'):\n    sys.modules[name] = None\nimport megatron_sd.ops,"
        " megatron_sd.ops.jsd\nprint(megatron_sd.ops.build_info().instruction_set)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in cpu_library.INSTRUCTION_SETS


@pytest.mark.skipif(cpu_library.LIBRARY is None, reason=cpu_library.MISSING)
def test_build_info_describes_this_library():
    info = build_info()
    assert info.library == cpu_library.LIBRARY_PATH and info.missing == "" and info.compiler
    assert info.instruction_set in cpu_library.INSTRUCTION_SETS
