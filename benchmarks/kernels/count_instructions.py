"""Registers of the CUDA kernels, and instructions a vocabulary entry of their loops: counted, not measured.

    python -m benchmarks.kernels.count_instructions [--arch 90a] [--tools FOLDER]

Needs nvcc; for the loops also cuobjdump and nvdisasm, in PATH or in FOLDER (NVIDIA's toolkit has them, and
so has triton's wheel under triton/backends/nvidia/bin). A loop is a backward branch without another inside;
straight runs between branches are shown apart, because a loop may hold several ways of which a vector takes
one. MUFU are the instructions of the special function unit, one of which takes as long as eight others.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "kernels/csrc/jsd_cuda.cu"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b(?!\.(?:DIV|U)).*?\b0x([0-9a-f]+)")
ENTRY = re.compile(r"Compiling entry function '\w*(jsd_[a-z_]+?_kernel)(?:IN3jsd4KindI(\w\w)Lb(\d)|I(\w)E)?")


@dataclass(frozen=True, kw_only=True)
class KernelSize:
    """What ptxas says of a kernel. spill_bytes: stores and loads together."""

    name: str
    registers: int
    spill_bytes: int


def compile_for(arch: str, out: Path, nvcc: str = "nvcc") -> list[KernelSize]:
    """Compile the kernels for one architecture into the cubin `out`. Raises CalledProcessError."""
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{arch}",
        "-Xptxas=-v",
        "-cubin",
        '-DMEGATRON_SD_CUDA_ARCHS=""',
        str(SOURCE),
    ]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=True)
    return list(kernel_sizes(done.stderr))


def kernel_sizes(text: str) -> Iterator[KernelSize]:
    """Read the output of ptxas -v."""
    name, spills = "", 0
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            name, spills = _name(entry), 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(found[1]) + int(found[2])
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            yield KernelSize(name=name, registers=int(found[1]), spill_bytes=spills)
            name = ""


def loops(sass: str) -> Iterator[list[list[str]]]:
    """The innermost loops of one kernel's disassembly, each as its straight runs."""
    code = [(int(found[1], 16), found[2]) for found in map(INSTRUCTION.match, sass.splitlines()) if found]
    targets = {int(found[1], 16) for _, text in code if (found := BRANCH.search(text))}
    backward = [
        (int(found[1], 16), at)
        for at, text in code
        if (found := BRANCH.search(text)) and int(found[1], 16) < at
    ]
    for start, end in backward:
        if any(start <= other_start and other_end <= end and (other_start, other_end) != (start, end)
               for other_start, other_end in backward):  # fmt: skip
            continue
        runs: list[list[str]] = [[]]
        for at, text in code:
            if start <= at <= end:
                if at in targets and runs[-1]:
                    runs.append([])
                runs[-1].append(text)
                if " BRA " in f" {text} ":
                    runs.append([])
        yield [run for run in runs if run]


def describe(run: list[str], entries: int) -> str:
    """Instructions and MUFU an entry, and what moves."""
    mufu = sum("MUFU" in text for text in run)
    moves = [name for name in ("LDS", "LDG", "STS", "STG") if any(f"{name}." in text for text in run)]
    return f"{len(run) / entries:5.1f} instructions, {mufu / entries:4.2f} MUFU  {' '.join(moves)}"


def _name(entry: re.Match) -> str:
    letters = {"f": "fp32", "t": "bf16"}
    kind = entry[2] or entry[4] or ""
    return " ".join(
        [entry[1], *(letters[letter] for letter in kind), *(["difference"] if entry[3] == "1" else [])]
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90a")
    parser.add_argument("--tools", type=Path)
    options = parser.parse_args()
    cuobjdump = str(options.tools / "cuobjdump") if options.tools else shutil.which("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "jsd.cubin"
        for size in compile_for(options.arch, cubin):
            print(
                f"sm_{options.arch}  {size.name:<42} {size.registers:3} registers, {size.spill_bytes} bytes"
                " spilled"
            )
        if not cuobjdump:
            raise SystemExit("no cuobjdump: the loops are not counted (--tools FOLDER)")
        sass = subprocess.run(
            [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    for kernel in sass.split("Function : ")[1:]:
        entry = ENTRY.search(f"Compiling entry function '{kernel.splitlines()[0]}")
        name = _name(entry) if entry else kernel.splitlines()[0]
        entries = 8 if "fp32" not in name else 4
        if "fused" not in name:
            continue
        print(f"\n{name}, a vector of {entries} entries")
        for runs in loops(kernel):
            if any("MUFU" in text for run in runs for text in run):
                print("  loop")
                for run in runs:
                    if len(run) >= entries:
                        print(f"    {describe(run, entries)}")


if __name__ == "__main__":
    main()
