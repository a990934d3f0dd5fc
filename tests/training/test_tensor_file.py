"""Safetensors files of our own writing: what the library reads, and a checksum that nobody has to read the
file for."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_sd.training.state.tensor_file import write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.randn(5).bfloat16(),
    "view": torch.arange(12, dtype=torch.float32).view(3, 4).t()[1:],
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "half": torch.ones(3, dtype=torch.float16),
}


def test_the_library_reads_what_was_written_and_the_checksum_is_the_files(tmp_path):
    path = tmp_path / "weights.safetensors"
    seal = write_tensors(path, TENSORS, {"format": "pt"})
    content = path.read_bytes()
    assert seal == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_tensors_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_sd.training.state.tensor_file._WRITE_BYTES", 7)
    write_tensors(tmp_path / "file", TENSORS, {})
    assert torch.equal(load_file(tmp_path / "file")["b"], TENSORS["b"])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory: .*absent/weights"):
        write_tensors(tmp_path / "absent" / "weights", TENSORS, {})
