"""Everything that only a GPU can show, in one command of less than ten minutes: `make gpu-check`, or

    python -m benchmarks.kernels.gpu_check [--json FILE] [--rounds 10] [--no-compile]

Needs a CUDA device, nvcc, a C++ compiler, and Python with torch, numpy and setuptools; pytest and
Liger-Kernel are used where installed, compute-sanitizer where it is in PATH or beside nvcc. Builds the
libraries, runs tests/ops/test_jsd_cuda.py, looks for memory errors and races on small shapes, measures this
card's floors, and then the kernels against them and against peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = "test_any_vocabulary or test_shards or test_layouts"


def missing() -> str:
    """What this machine lacks, "" if nothing."""
    if importlib.util.find_spec("torch") is None:
        return "torch"
    import torch

    if not torch.cuda.is_available():
        return f"a CUDA device that torch sees (torch {torch.__version__}, CUDA {torch.version.cuda})"
    return "" if nvcc() else "nvcc, in $CUDA_HOME/bin, PATH or /usr/local/cuda/bin"


def nvcc() -> str | None:
    """Its path."""
    places = [
        os.environ.get("CUDA_HOME", "") + "/bin/nvcc",
        shutil.which("nvcc") or "",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def architecture() -> str:
    """Of the first device, as setup.py takes it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major in (9, 10) else ''}"


def run(title: str, command: list[str], **environment: str) -> int:
    """One step as a process of its own; its exit status."""
    print(f"== {title}", flush=True)
    started = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    print(
        f"   {'passed' if status == 0 else f'FAILED with status {status}'} in"
        f" {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return status


def sanitizer() -> str | None:
    """compute-sanitizer's path."""
    beside = Path(nvcc() or "/").resolve().parent / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def check() -> dict[str, int | str]:
    """Build, test, sanitize. A step's exit status, or why it was left out."""
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    results: dict[str, int | str] = {}
    results["build"] = run(
        f"build for sm_{architecture()}", build, MEGATRON_SD_CUDA="1", MEGATRON_SD_CUDA_ARCHS=architecture()
    )
    if importlib.util.find_spec("pytest") is None:
        print("== tests: pytest is not installed, so they do not run")
        return results | {"tests": "no pytest"}
    tests = [sys.executable, "-m", "pytest", "tests/ops/test_jsd_cuda.py", "-p", "no:cacheprovider"]
    results["tests"] = run("tests", tests)
    if tool := sanitizer():
        for kind in ("memcheck", "racecheck"):
            command = [
                tool,
                "--tool",
                kind,
                "--error-exitcode",
                "9",
                *tests,
                "-x",
                "-k",
                f"({SMALL}) and not 1200000",
            ]
            results[kind] = run(kind, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    else:
        print("== memcheck, racecheck: no compute-sanitizer, so they do not run")
        results["memcheck"] = results["racecheck"] = "no compute-sanitizer"
    return results


def benchmarks(*, rounds: int, compiled: bool) -> dict:
    """Floors of this card, then rows and head against them."""
    from benchmarks.kernels import gpu_linear, gpu_rows, gpu_timing

    print("== floors", flush=True)
    copied, multiplied = gpu_timing.copy_bytes_a_ms(rounds), gpu_timing.matmul_flops_a_ms(rounds)
    print(f"  copies {copied / 1e9:.2f} TB/s, multiplies {multiplied / 1e9:.0f} TFLOP/s in bfloat16")
    print("== the divergence of rows, value and gradient", flush=True)
    rows = gpu_rows.measure(copied, rounds=rounds, compiled=compiled)
    print("== head and divergence together", flush=True)
    linear = gpu_linear.measure(multiplied, rounds=rounds)
    return {"copy_tb_a_s": copied / 1e9, "matmul_tflop_a_s": multiplied / 1e9, "rows": rows, "linear": linear}


def machine() -> dict[str, str]:
    """Card, versions, and the commit that was measured."""
    import torch

    from megatron_sd.ops import build_info

    info = build_info()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda_toolkit": info.cuda_toolkit,
        "cuda_architectures": info.cuda_architectures,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    """Exit status 1 if a step failed, 2 if this machine cannot run them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "runs/gpu_check.json")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    if lacking := missing():
        print(f"gpu-check needs {lacking}; nothing was run", file=sys.stderr)
        raise SystemExit(2)
    results = check()
    figures: dict = {}
    if results["build"] == 0:
        figures = {"machine": machine()} | benchmarks(rounds=options.rounds, compiled=not options.no_compile)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"steps": results} | figures, indent=2) + "\n")
    print(f"== written to {options.json}")
    if failed := [step for step, status in results.items() if isinstance(status, int) and status]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
