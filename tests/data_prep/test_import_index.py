"""An index that others built is taken over as it is, or refused; nothing is encoded but for comparison."""

import json
import shutil

import faiss
import numpy as np
import pytest
import torch

from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.table import PassageTable
from data_prep.sources.questions import ImportConfig, import_file
from data_prep.vectors import import_index as module
from data_prep.vectors.encode import EncodeConfig, encode_passages, encoder_settings
from data_prep.vectors.import_index import ImportIndexConfig, import_index
from data_prep.vectors.vector_index import VectorIndexConfig
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.corpus.encoder import Encoder
from megatron_sd.retrieval.corpus.manifest import read_manifest
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

NUM_ROWS = 25
E5 = {
    "passage_format": "passage: {contents}",
    "query_prefix": "query: ",
    "max_tokens": 24,
    "devices": ("cpu",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """wiki.jsonl in Search-R1's form, ids that are row numbers, and e5_Flat.index of its rows as their
    script builds it."""
    folder = tmp_path_factory.mktemp("wiki")
    tiny_encoder(folder / "encoder")
    contents = [f'"{WORDS[n % 8]}"\n{WORDS[n * 5 % 7]} {n} {WORDS[n // 4 % 8]}' for n in range(NUM_ROWS)]
    rows = [json.dumps({"id": f"{n}", "contents": own}) for n, own in enumerate(contents)]
    (folder / "wiki.jsonl").write_text("\n".join(rows))
    named = [json.dumps({"id": f"w{97 - n}", "contents": own}) for n, own in enumerate(contents)]
    (folder / "named.jsonl").write_text("\n".join([*named[:3], "{broken", *named[3:], named[0]]))
    for name in ("wiki", "named"):
        options = {"input": f"{folder}/{name}.jsonl", "output": f"{folder}/{name}", "max_reject_share": 0.2}
        import_file(ImportConfig(kind="passages", source="wiki", **options))
    settings = encoder_settings(EncodeConfig(passages="", encoder=f"{folder}/encoder", output="", **E5))
    vectors = Encoder(folder / "encoder", settings, torch.device("cpu")).encode(
        [f"passage: {own}" for own in contents]
    )
    _write_index(folder / "e5_Flat.index", vectors)
    junk = np.ones((1, 32), np.float32)
    _write_index(folder / "named.index", np.concatenate([vectors[:3], junk, vectors[3:], junk]))
    np.save(folder / "vectors.npy", vectors)
    return folder


def _write_index(path, vectors, factory="Flat", metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(vectors.shape[1], factory, metric)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


def _config(folder, output, **changes):
    paths = {"passages": f"{folder}/wiki", "index": f"{folder}/e5_Flat.index", "encoder": f"{folder}/encoder"}
    return ImportIndexConfig(**(paths | E5 | {"output": str(output), "rows_per_shard": 8} | changes))


def test_every_passage_gets_the_vector_of_its_row(folder, tmp_path):
    """Directories are in order of ids as text (0, 1, 10, 11, ...), indices in that of the file."""
    version = import_index(_config(folder, tmp_path / "v"))
    ids = [passage.id for passage in PassageTable(folder / "wiki")]
    assert ids[:4] == ["0", "1", "10", "11"]
    expected = np.load(folder / "vectors.npy")[[int(id_) for id_ in ids]].astype(np.float16)
    found = VectorShards(tmp_path / "v")
    assert np.array_equal(found.take(np.arange(NUM_ROWS)), expected.astype(np.float32))
    assert (found.version, found.manifest.made_from) == (
        version,
        {"passages": PassageTable(folder / "wiki").version},
    )
    assert found.manifest.settings["taken_from"]["index"] == "e5_Flat.index"
    assert found.manifest.settings["encoder"]["query_prefix"] == "query: "
    files = sorted(read_manifest(tmp_path / "v")[0].files)
    assert [name for name in files if name.startswith("vectors")] == [
        f"vectors-{n:05d}.npy" for n in range(4)
    ]
    assert "encoder/model.safetensors" in files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v"]


def test_a_corpus_of_it_is_that_of_encoded_passages(folder, tmp_path):
    import_index(_config(folder, tmp_path / "v"))
    encode_passages(
        EncodeConfig(passages=f"{folder}/wiki", encoder=f"{folder}/encoder", output=f"{tmp_path}/own", **E5)
    )
    found = []
    for name in ("v", "own"):
        paths = {
            "passages": f"{folder}/wiki",
            "vectors": f"{tmp_path}/{name}",
            "output": f"{tmp_path}/corpus-{name}",
        }
        build_index(IndexConfig(**paths, bm25=False, vector_index=VectorIndexConfig(kind="flat")))
        retriever = CorpusRetriever(tmp_path / f"corpus-{name}", SearchConfig(method="dense"))
        found.append(
            [[hit.passage.id for hit in hits] for hits in retriever.find(["kalo 17", "dava sul"], 5)]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_the_order_of_a_file_whose_ids_are_no_row_numbers(folder, tmp_path, factory):
    """A broken row and a repeated one have rows in the index, and no passage."""
    index = faiss.read_index(f"{folder}/named.index")
    path = _write_index(tmp_path / "i.index", index.reconstruct_n(0, index.ntotal), factory)
    import_index(
        _config(
            folder, tmp_path / "v", passages=f"{folder}/named", index=str(path), order=f"{folder}/named.jsonl"
        )
    )
    vectors = np.load(folder / "vectors.npy").astype(np.float16).astype(np.float32)
    expected = vectors[[97 - int(passage.id[1:]) for passage in PassageTable(folder / "named")]]
    assert np.array_equal(VectorShards(tmp_path / "v").take(np.arange(NUM_ROWS)), expected)


def test_an_index_that_does_not_belong_to_the_passages_is_refused(folder, tmp_path):
    vectors = np.load(folder / "vectors.npy")
    swapped = vectors.copy()
    swapped[[10, 11]] = vectors[[11, 10]]
    more = np.concatenate([vectors, vectors[:1]])
    (tmp_path / "part").write_bytes((folder / "e5_Flat.index").read_bytes()[:500])

    def built(name, *given):
        return {"index": str(_write_index(tmp_path / name, *given))}

    cases = [
        (
            built("0", swapped),
            r"passage '10': its vector, row 10 of .* cosine of .*above 0.99: encoder, passage_format",
        ),
        (
            {"passage_format": "{text}"},
            r"passage '0': its vector, row 0 of .*passage_format '\{text\}', pooling",
        ),
        (built("1", more), "holds 26 vectors, expected 25, the passages of .*wiki: give the file"),
        (built("2", vectors[:, :8].copy()), "has vectors of 8 numbers, expected 32 as .*encoder makes"),
        (built("3", vectors, "SQ8"), "is an IndexScalarQuantizer of inner product, expected IndexFlat or"),
        (built("4", vectors, "Flat", faiss.METRIC_L2), "is an IndexFlatL2 of metric 1, expected"),
        (built("5", 3 * vectors), "not of length 1, expected that with normalize true"),
        ({"index": str(tmp_path / "part")}, "part is no FAISS index that can be read"),
        (
            {"passages": f"{folder}/named"},
            "passage 'w73' has no row in .*expected ids 0 to 24, which are row numbers; give",
        ),
        ({"order": f"{folder}/named.jsonl"}, "holds 25 vectors, expected 27, the passages of .*named.jsonl"),
        (
            {"index": f"{folder}/named.index", "order": f"{folder}/named.jsonl"},
            "named.jsonl has no passage '0', expected all",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            import_index(_config(folder, tmp_path / "v", checked_passages=NUM_ROWS, **changes))
        assert not (tmp_path / "v").exists()
        shutil.rmtree(tmp_path / "v.partial", ignore_errors=True)
    with pytest.raises(ConfigError, match="checked_passages: found 0, expected at least 1"):
        import_index(_config(folder, tmp_path / "v", checked_passages=0))


def test_a_start_after_a_kill_goes_on_after_its_whole_shards(folder, tmp_path, monkeypatch):
    import_index(_config(folder, tmp_path / "undisturbed"))
    written = []

    def dying(path, vectors):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_shard(path, vectors)

    write_shard = module.write_shard
    monkeypatch.setattr(module, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        import_index(_config(folder, tmp_path / "v"))
    import_index(_config(folder, tmp_path / "v"))
    assert written == [f"vectors-{n:05d}.npy" for n in (0, 1, 2, 2, 3)]
    assert read_manifest(tmp_path / "v")[1] == read_manifest(tmp_path / "undisturbed")[1]
