"""The CUDA library: compiled for every architecture without spilling, found by setup.py, loadable without a
driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sd.errors import ConfigError
from megatron_sd.ops import build_info
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.native import calls, cuda_library
from tests.ops.divergences import JSD

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or (
    "/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None
)
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc on this machine: the CUDA source is not compiled")
needs_library = pytest.mark.skipif(
    cuda_library.LIBRARY is None, reason=f"no CUDA library: {cuda_library.MISSING}"
)
from benchmarks.kernels.count_instructions import compile_for  # noqa: E402


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_no_kernel_spills(arch, tmp_path, record_property):
    sizes = compile_for(arch, tmp_path / "jsd.cubin", NVCC)
    assert len(sizes) == 20 and len({size.name for size in sizes}) == 20
    for size in sizes:
        record_property(f"sm_{arch} {size.name}", size.registers)
        assert size.spill_bytes == 0, size
        assert size.registers <= 64 or "merge" in size.name, f"{size}: two blocks must share a multiprocessor"


def setup_py(tmp_path, prelude="", **environment):
    """setup.py's view of CUDA, in a process of its own: (exit code, output)."""
    program = (
        "import os, setuptools; setuptools.setup = lambda **options: None; __file__ ="
        " 'setup.py'\nexec(open('setup.py').read())\ncommand = BuildNative(setuptools.Distribution());"
        " command.build_lib = 'lib';"
        f" command.ensure_finalized()\n{prelude}\ncommand._build_cuda(wish=os.environ['MEGATRON_SD_CUDA'])\n"
    )
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_asking_for_cuda_without_nvcc_is_an_error_that_says_where_it_looked(tmp_path):
    nothing = {"prelude": "os.access = lambda *_: False", "CUDA_HOME": "/no/such"}
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="1", **nothing)
    assert code != 0 and "MEGATRON_SD_CUDA=1 but no nvcc: looked for /no/such/bin/nvcc, " in said
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="auto", **nothing)
    assert code == 0 and "no CUDA library: MEGATRON_SD_CUDA=auto, nvcc not found" in said


def test_cuda_can_be_left_out_and_a_wrong_wish_is_an_error(tmp_path):
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="0")
    assert code == 0 and "no CUDA library: MEGATRON_SD_CUDA=0" in said
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="yes")
    assert code != 0 and "MEGATRON_SD_CUDA is 'yes', expected 0, 1 or auto" in said


def test_a_compiler_that_fails_is_an_error_only_if_cuda_was_asked_for(tmp_path):
    nvcc = tmp_path / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_80 && exit 0\necho broken >&2; exit 2\n'
    )
    nvcc.chmod(0o755)
    home = {"CUDA_HOME": str(tmp_path / "toolkit")}
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="auto", **home)
    assert (
        code == 0
        and "WARNING: nvcc could not compile the CUDA library" in said
        and "compute_80,code=sm_80" in said
    )
    assert "sm_90a" not in said, "an architecture that this nvcc does not know is left out"
    code, said = setup_py(tmp_path, MEGATRON_SD_CUDA="1", MEGATRON_SD_CUDA_ARCHS="90a;80", **home)
    assert code != 0 and "compute_80,code=sm_80" in said and "compute_90a,code=sm_90a" in said
    assert "compute_90,code=compute_90" in said


@needs_library
def test_build_info_names_architectures_and_toolkit():
    info = build_info()
    assert info.cuda_library == cuda_library.LIBRARY_PATH and info.cuda_missing == ""
    assert info.cuda_architectures and info.cuda_toolkit.count(".") == 1


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_the_library_loads_and_says_what_is_missing():
    assert cuda_library.obstacle(0).startswith(
        "CUDA says: "
    ) and cuda_library.architectures() in cuda_library.obstacle(0)


def call(impl):
    logits, rows = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.5]]), torch.tensor([0])
    return jsd_rows(logits, logits.flip(0), rows, rows, torch.ones(1), divergence=JSD, impl=impl)


def test_cuda_without_its_library_or_on_cpu_tensors_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_library, "LIBRARY", None)
    monkeypatch.setattr(cuda_library, "MISSING", "the file does not exist")
    with pytest.raises(
        ConfigError, match="impl='cuda' is not part of this build, .* the file does not exist"
    ):
        call("cuda")
    monkeypatch.setattr(cuda_library, "LIBRARY", object())
    with pytest.raises(ValueError, match="impl='cuda' cannot serve tensors on cpu; expected CUDA tensors"):
        call("cuda")


def test_a_failed_call_carries_cudas_words(monkeypatch):
    class Failing:
        def megatron_sd_cuda_scratch_bytes(self, task):
            return 0

        def megatron_sd_cuda_jsd_rows(self, task, device, stream):
            return 700

        def megatron_sd_cuda_error(self, error):
            return b"an illegal memory access was encountered"

        def megatron_sd_cuda_architectures(self):
            return b"80"

    monkeypatch.setattr(cuda_library, "LIBRARY", Failing())
    monkeypatch.setattr(cuda_library, "place", lambda device: (0, None))
    monkeypatch.setattr(calls, "_backend", lambda device: cuda_library)
    logits, rows = torch.zeros(1, 4), torch.tensor([0])
    options = {"divergence": JSD, "with_gradient": False}
    with pytest.raises(
        RuntimeError, match=r"jsd_rows on cpu failed: an illegal memory access was encountered \(700\)"
    ):
        calls.native_divergence(logits, logits, rows, rows, **options)
    with pytest.raises(ValueError, match="instruction_set is 'avx2', expected None"):
        calls.native_divergence(logits, logits, rows, rows, instruction_set="avx2", **options)
