"""The SLURM array of docs/retrieval.md, as it stands there but for its size and GPUs, under a real SLURM."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, write_table
from data_prep.vectors.encode import EncodeConfig, encode_passages
from data_prep.vectors.vectors import VectorShards
from tests.retrieval.fakes_encoder import tiny_encoder

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "retrieval.md"
LONGEST_S = 240


def block() -> str:
    """The page's two commands, for two parts and no GPU."""
    (found,) = re.findall(r"```\n(PARTS=\$\(sbatch .*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert "--array=0-7" in found and ", 8]" in found
    return found.replace("--array=0-7", "--array=0-1").replace(", 8]", ", 2]").replace(" --gpus=1", "")


def test_the_pages_array_makes_the_vectors_of_one_machine(cluster, tmp_path):
    rows = (SourcedPassage(id=f"{n:02d}", title="kalo", text=f"dava {n}") for n in range(30))
    write_table(tmp_path / "passages", rows, Origin())
    encoder = tiny_encoder(tmp_path / "encoder")
    (tmp_path / "encode.yaml").write_text(
        f"passages: passages\nencoder: {encoder}\noutput: vectors\nrows_per_shard: 5\nmax_tokens: 16\n"
        "devices: [cpu]\n"
    )
    whole = EncodeConfig(
        passages=str(tmp_path / "passages"),
        encoder=str(encoder),
        output=str(tmp_path / "whole"),
        rows_per_shard=5,
        max_tokens=16,
        devices=("cpu",),
    )
    expected = encode_passages(whole)
    path = f"{Path(sys.executable).parent}:{cluster['PATH']}"
    environment = cluster | {"PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-euc", block()], cwd=tmp_path, env=environment, check=True, timeout=60)
    deadline = time.monotonic() + LONGEST_S
    while not (tmp_path / "vectors").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    said = "\n".join(path.read_text() for path in sorted(tmp_path.glob("slurm-*.out")))
    assert (tmp_path / "vectors").exists(), said
    assert VectorShards(tmp_path / "vectors").version == expected
    assert "part 0 of 2 -> vectors.parts/0-of-2" in said and "part 1 of 2 -> vectors.parts/1-of-2" in said
