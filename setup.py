"""Packaging of megatron-sd. Versions are those that were run together; tool settings live in pyproject.toml.

The native code (kernels/csrc) needs a C++17 compiler and nothing else, neither torch nor Python's headers; the library lies at
megatron_sd/_C.so. Where it cannot be compiled a warning says so, and megatron_sd/ops computes with torch.
"""

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
    "tqdm",
    "xxhash",
    "zstandard",
    "httpx>=0.27",
]
EXTRAS = {
    "vllm": ["vllm>=0.32,<0.33"],
    "flash-attn": ["flash-attn"],
    # Each brings its own `faiss` in place of faiss-cpu's: uninstall faiss-cpu first, and never install both.
    "retriever-gpu-cu12": ["faiss-gpu>=1.15,<2"],
    "retriever-gpu-cu13": ["faiss-gpu-cuvs>=1.15,<2"],
    "bench": ["trl>=1.16,<1.17"],
    "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.12", "setuptools>=77"],
}

# No option that changes results but fused a * b + c, and none that ties the library to this machine's processor.
COMPILE = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
NATIVE = Extension(
    "megatron_sd._C",
    sources=["kernels/csrc/jsd_cpu.cpp"],
    depends=["kernels/csrc/jsd.h"],
    language="c++",
    extra_compile_args=[*COMPILE, *OPENMP],
    extra_link_args=OPENMP,
    optional=True,
)


class BuildNative(build_ext):
    """A library that is loaded by its path, not imported: its name carries no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """megatron_sd._C -> megatron_sd/_C.so."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class NativeWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="megatron-sd",
    version="0.1.0",
    description="Trains search agents with GRPO and on-policy hindsight self-distillation (SD-Search) on DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_sd*", "data_prep*", "eval*", "launch*"]),
    package_data={
        "launch": ["configs/*.yaml", "*.sbatch"],
        "data_prep": ["coldstart_model/*"],
    },
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sd-search = launch.cli:main"]},
)
