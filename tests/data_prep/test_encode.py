"""Vectors: pooling against hand-made sums, and directories that a kill at any moment leaves able to go on."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data_prep.passages.chunk import ChunkConfig, chunk_passages
from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, PassageTable, write_table
from data_prep.vectors import encode as encode_module
from data_prep.vectors.encode import EncodeConfig, encode_part, encode_passages, encoder_settings
from data_prep.vectors.parts import remove_parts
from data_prep.vectors.vectors import VectorShards
from launch.data import encode as encode_command
from megatron_sd.durable.resumable import locked
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.encoder import Encoder, choose_device
from megatron_sd.retrieval.corpus.manifest import MANIFEST_NAME, file_entries, read_manifest, write_manifest
from tests.nursery import nursery
from tests.retrieval.fakes import START_S, WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

SETTINGS = encoder_settings(EncodeConfig(passages="", encoder="", output="", max_tokens=12, batch_size=4))
TEXTS = ["kalo", "kalo dava sul", "a", "miren tovi rask lunet pergo kalo dava sul " * 3, "dava kalo sul"]


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    path = tmp_path_factory.mktemp("passages") / "passages"
    rows = (
        SourcedPassage(id=f"{n:03d}", title=WORDS[n % 8], text=f"{WORDS[n * 3 % 8]} {n} " * (1 + n % 7))
        for n in range(100)
    )
    write_table(path, rows, Origin())
    return path


def _config(passages, encoder_path, output, **changes):
    paths = {"passages": str(passages), "encoder": str(encoder_path), "output": str(output)}
    return EncodeConfig(**paths, max_tokens=16, rows_per_shard=10, batch_size=4, **changes)


def _expected(path, text, pooling, max_tokens):
    """One text through plain transformers, without padding."""
    inputs = AutoTokenizer.from_pretrained(path)(
        text, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path)(**inputs).last_hidden_state[0].double()
    pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_batches_and_padding_change_nothing(encoder_path, pooling):
    settings = dataclasses.replace(SETTINGS, pooling=pooling)
    vectors = Encoder(encoder_path, settings, choose_device("cpu")).encode(TEXTS)
    assert vectors.shape == (5, 32) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector == pytest.approx(_expected(encoder_path, text, pooling, 12), abs=2e-6)


def test_prefixes_normalisation_and_nothing(encoder_path):
    plain = Encoder(encoder_path, SETTINGS, choose_device("cpu"))
    prefixed = Encoder(
        encoder_path, dataclasses.replace(SETTINGS, query_prefix="kalo "), choose_device("cpu")
    )
    assert np.array_equal(prefixed.encode_queries(["dava", "sul"]), plain.encode(["kalo dava", "kalo sul"]))
    raw = Encoder(encoder_path, dataclasses.replace(SETTINGS, normalize=False), choose_device("cpu")).encode(
        TEXTS
    )
    norms = np.linalg.norm(raw, axis=1)
    assert np.abs(norms - 1).max() > 0.1
    assert raw / norms[:, None] == pytest.approx(plain.encode(TEXTS), abs=2e-6)
    assert plain.encode([]).shape == (0, 32)


def test_vectors_of_a_passages_directory(passages, encoder_path, tmp_path):
    version = encode_passages(
        _config(passages, encoder_path, tmp_path / "vectors", passage_format="{title} {text}")
    )
    shards = VectorShards(tmp_path / "vectors")
    assert (shards.version, len(shards), shards.dim) == (version, 100, 32)
    table = PassageTable(passages)
    assert shards.manifest.made_from == {"passages": table.version}
    settings = dataclasses.replace(SETTINGS, max_tokens=16)
    expected = Encoder(encoder_path, settings, choose_device("cpu")).encode(
        [f"{row.title} {row.text}" for row in table]
    )
    assert np.concatenate(list(shards.blocks(7))) == pytest.approx(expected, abs=2e-3)  # half precision
    rows = np.array([99, 0, 10, 9])
    assert np.array_equal(shards.take(rows), np.concatenate(list(shards.blocks(7)))[rows])
    with pytest.raises(DataError, match="vectors exists"):
        encode_passages(_config(passages, encoder_path, tmp_path / "vectors"))


@pytest.mark.slow
@pytest.mark.ranks
def test_several_processes_write_the_same_bytes(passages, encoder_path, tmp_path):
    one = encode_passages(_config(passages, encoder_path, tmp_path / "one"))
    assert encode_passages(_config(passages, encoder_path, tmp_path / "two", devices=("cpu", "cpu"))) == one


def _interrupted(argument, partial, rng):
    """Start, kill -9 at a random moment after the first file has appeared; the names of the shards that are
    whole then."""
    process = nursery().start("launch.cli:main", argument, ranks=1)
    before = len(list(partial.glob("vectors-*")))
    deadline = time.monotonic() + START_S
    while (
        len(list(partial.glob("vectors-*"))) == before
        and process.code(0, 0) is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    process.signal(signal.SIGKILL)
    process.wait()
    return {path.name: path.stat().st_mtime_ns for path in partial.glob("vectors-*")}


@pytest.mark.slow
def test_killed_again_and_again_the_bytes_are_the_same(passages, encoder_path, tmp_path):
    expected = encode_passages(_config(passages, encoder_path, tmp_path / "whole"))
    config = _config(passages, encoder_path, tmp_path / "killed")
    argument = ["data", "encode"]
    argument += [
        f"--{name}={getattr(config, name)}"
        for name in ("passages", "encoder", "output", "max_tokens", "rows_per_shard")
    ]
    argument += ["--batch_size=4", "--devices=[cpu]"]
    partial, rng = tmp_path / "killed.partial", random.Random(0)
    kept = {}
    for _ in range(2):
        if (tmp_path / "killed").exists():
            break
        now = _interrupted(argument, partial, rng)
        if partial.exists():
            assert {name: now[name] for name in kept} == kept  # whole shards are never written again
        kept = now
    if not (tmp_path / "killed").exists():
        assert encode_passages(config) == expected
    assert VectorShards(tmp_path / "killed").version == expected
    assert not partial.exists()


def test_parts_of_several_machines_are_joined_to_the_same_bytes(passages, encoder_path, tmp_path, caplog):
    """Three parts, of which one was killed after its first shard and one never began: the joining start makes
    what is missing, and encodes nothing that a part has encoded."""
    whole = _config(passages, encoder_path, tmp_path / "whole")
    expected = encode_passages(whole)
    joined = dataclasses.replace(whole, output=str(tmp_path / "joined"))
    first = encode_part(joined, (0, 3))
    assert first == tmp_path / "joined.parts/0-of-3"
    assert [path.name for path in sorted(first.glob("vectors-*"))] == [
        f"vectors-{number:05}.npy" for number in (0, 3, 6, 9)
    ]
    second = encode_part(dataclasses.replace(joined, devices=("cpu", "cpu")), (1, 3))
    (second / "vectors-00007.npy").unlink()
    times = {
        path.name: path.stat().st_mtime_ns for part in (first, second) for path in part.glob("vectors-*")
    }
    assert len(times) == 6
    assert encode_passages(joined) == expected
    assert VectorShards(tmp_path / "joined").version == expected
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "joined").glob("vectors-*")}
    assert len(kept) == 10 and times.items() <= kept.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined", "whole"]
    with pytest.raises(DataError, match="joined exists"):
        encode_part(joined, (2, 3))


def test_a_join_takes_and_removes_its_own_parts_alone(passages, encoder_path, tmp_path, monkeypatch):
    """Names that begin alike or hold glob characters, what lies beside the parts, and a part under way."""
    whole = _config(passages, encoder_path, tmp_path / "whole")
    expected = encode_passages(whole)
    made = {name: dataclasses.replace(whole, output=str(tmp_path / name)) for name in ("v[12]", "v1", "v")}
    other = encode_part(made["v1"], (0, 2))
    own = [encode_part(made["v[12]"], (number, 2)) for number in (0, 1)]
    foreign = own[0].parent / "notes-of-mine"
    foreign.mkdir()
    sealed = own[0].parent / "3-of-4"
    (tmp_path / "whole").rename(sealed)  # whole vectors, which have no plan
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", _interrupt)  # no shard is encoded again
        assert encode_passages(made["v[12]"]) == expected
    assert not own[0].exists() and not own[1].exists() and foreign.is_dir()
    assert len(list(other.glob("vectors-*"))) == 5 and VectorShards(sealed).version == expected
    monkeypatch.setattr(os, "link", _no_link)  # another disk: copied
    assert encode_passages(made["v1"]) == expected
    late = encode_part(made["v"], (0, 2))
    with locked(late):
        remove_parts(tmp_path / "v")
    assert len(list(late.glob("vectors-*"))) == 5
    remove_parts(tmp_path / "v")
    assert not late.parent.exists()


def test_a_part_keeps_what_a_killed_join_took(passages, encoder_path, tmp_path, monkeypatch):
    config = _config(passages, encoder_path, tmp_path / "vectors")
    part = encode_part(config, (0, 2))
    (part / "vectors-00008.npy").unlink()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Encoder, "encode", _interrupt)
        encode_passages(config)
    times = {path.name: path.stat().st_mtime_ns for path in part.glob("vectors-*")}
    assert len(times) == 4
    encode_part(config, (0, 2))
    again = {path.name: path.stat().st_mtime_ns for path in part.glob("vectors-*")}
    assert len(again) == 5 and times.items() <= again.items()


def test_parts_that_do_not_fit_are_refused_and_kept(passages, encoder_path, tmp_path):
    config = _config(passages, encoder_path, tmp_path / "vectors")
    for part in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=r"part: found \[-?\d, \d\], expected a number from 0"):
            encode_part(config, part)
    other = encode_part(dataclasses.replace(config, pooling="cls"), (0, 2))
    with pytest.raises(DataError, match=r"0-of-2 was begun from something else: settings\.pooling was 'cls'"):
        encode_passages(config)
    assert len(list(other.glob("vectors-*"))) == 5
    with pytest.raises(DataError, match=r"0-of-2 was begun from something else"):
        encode_part(config, (0, 2))
    with locked(other), pytest.raises(DataError, match=r"0-of-2 is being written by another process"):
        encode_passages(dataclasses.replace(config, pooling="cls"))


def test_a_part_is_asked_for_by_the_command(passages, encoder_path, tmp_path, capsys):
    argument = [f"--passages={passages}", f"--encoder={encoder_path}", f"--output={tmp_path / 'vectors'}"]
    argument += ["--max_tokens=16", "--rows_per_shard=60", "--devices=[cpu]"]
    for part in (0, 1):
        encode_command([*argument, f"--part=[{part}, 2]"])
        assert capsys.readouterr().out == f"part {part} of 2 -> {tmp_path / 'vectors'}.parts/{part}-of-2\n"
    encode_command(argument)
    assert capsys.readouterr().out.startswith("vectors version ")


def test_what_was_begun_from_something_else_is_refused(passages, encoder_path, tmp_path, monkeypatch):
    """Also when the kill came while the vectors were being sealed."""
    begun = _config(passages, encoder_path, tmp_path / "vectors")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode_module, "write_manifest", _interrupt)
        encode_passages(begun)
    other = shutil.copytree(encoder_path, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    for changes, message in [
        ({"pooling": "cls"}, r"settings\.pooling was 'mean' and is 'cls'; use what it was begun from"),
        (
            {"encoder": str(other)},
            r"encoder\.config\.json\.num_bytes was \d+ and is \d+, encoder\.config\.json\.xxh3_128 was",
        ),
        ({"rows_per_shard": 11}, "rows_per_shard was 10 and is 11"),
    ]:
        with pytest.raises(DataError, match=message):
            encode_passages(dataclasses.replace(begun, **changes))
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", _interrupt)  # no shard is encoded again
        version = encode_passages(begun)
    assert version == encode_passages(dataclasses.replace(begun, output=str(tmp_path / "again")))
    with pytest.raises(ConfigError, match=r"passage_format: found '\{body\}'"):
        encode_passages(dataclasses.replace(begun, passage_format="{body}", output=str(tmp_path / "x")))
    with pytest.raises(DataError, match="no encoder directory"):
        encode_passages(dataclasses.replace(begun, encoder=str(tmp_path), output=str(tmp_path / "x")))


def _no_link(*_arguments):
    raise OSError(18, "Invalid cross-device link")


def _interrupt(*_arguments):
    raise KeyboardInterrupt


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_an_encoder_or_of_a_shard_runs(passages, encoder_path, tmp_path):
    canary = tmp_path / "canary"
    pickled = shutil.copytree(encoder_path, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    remote = shutil.copytree(encoder_path, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (remote / "config.json").write_text(json.dumps(config | own))
    (remote / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    for encoder in (pickled, remote):
        with pytest.raises(DataError, match="cannot be loaded|holds no weights"):
            encode_passages(_config(passages, encoder, tmp_path / f"{encoder.name}.out"))
    encode_passages(_config(passages, encoder_path, tmp_path / "vectors"))
    shard = tmp_path / "vectors/vectors-00003.npy"
    np.save(shard, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    manifest, _ = read_manifest(tmp_path / "vectors")
    (tmp_path / "vectors" / MANIFEST_NAME).unlink()
    write_manifest(
        tmp_path / "vectors", dataclasses.replace(manifest, files=file_entries(tmp_path / "vectors"))
    )
    with pytest.raises(DataError, match="no array of numbers"):
        VectorShards(tmp_path / "vectors")
    assert not canary.exists()


def test_vectors_of_other_passages_are_refused(passages, encoder_path, tmp_path):
    encode_passages(_config(passages, encoder_path, tmp_path / "vectors"))
    chunk_passages(ChunkConfig(passages=str(passages), output=str(tmp_path / "chunks"), size=3))
    with pytest.raises(DataError, match="holds vectors of the passages"):
        build_index(
            IndexConfig(
                passages=str(tmp_path / "chunks"),
                vectors=str(tmp_path / "vectors"),
                output=str(tmp_path / "c"),
            )
        )
    (tmp_path / "p.jsonl").write_text('{"id": "1", "text": "kalo"}')
    with pytest.raises(DataError, match="found no passages directory"):
        build_index(
            IndexConfig(
                passages=f"{tmp_path}/p.jsonl", vectors=str(tmp_path / "vectors"), output=str(tmp_path / "c")
            )
        )
    with pytest.raises(ConfigError, match="bm25: found false without vectors"):
        build_index(IndexConfig(passages=str(passages), bm25=False, output=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()
