"""The Qdrant backend through its official client and that client's own in-memory mode."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, PassageTable, write_table
from data_prep.upload.qdrant import upload_passages
from data_prep.upload.source import UploadConfig
from data_prep.vectors.encode import EncodeConfig, encode_passages
from data_prep.vectors.vector_index import exact_search
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import QdrantConfig, RetrieverConfig
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError, DataError, RetrievalError
from megatron_sd.retrieval.corpus.encoder import Encoder, EncoderSettings, choose_device
from megatron_sd.retrieval.remote import qdrant
from megatron_sd.retrieval.remote.qdrant import QdrantRetriever
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

QUERIES = ["kalo 7", "dava sul", "pergo"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qdrant")
    rows = [
        SourcedPassage(id=f"{n:02d}", title=WORDS[n % 8], text=f"{WORDS[n * 3 % 8]} {n}") for n in range(40)
    ]
    write_table(folder / "passages", rows, Origin())
    tiny_encoder(folder / "encoder")
    paths = {"passages": f"{folder}/passages", "encoder": f"{folder}/encoder", "output": f"{folder}/vectors"}
    encode_passages(EncodeConfig(**paths, rows_per_shard=16, devices=("cpu",)))
    qdrant = QdrantConfig(
        url="http://127.0.0.1:6333", collection="wiki", vectors=f"{folder}/vectors", device="cpu"
    )
    return UploadConfig(passages=f"{folder}/passages", qdrant=qdrant, batch_size=7)


@pytest.fixture
def client(config):
    client = QdrantClient(":memory:")
    assert upload_passages(config, config.qdrant, client) == 40
    return client


def test_what_is_uploaded_is_found_as_exact_search_finds_it(config, client):
    retriever = QdrantRetriever(config.qdrant, client)
    shards = VectorShards(Path(config.qdrant.vectors))
    assert retriever.corpus_version == shards.version
    settings = EncoderSettings(**shards.manifest.settings["encoder"])
    queries = Encoder(shards.directory / "encoder", settings, choose_device("cpu")).encode_queries(QUERIES)
    passages = list(PassageTable(shards.directory.parent / "passages"))
    vectors = np.concatenate(list(shards.blocks(100)))
    for hits, rows, query in zip(
        asyncio.run(retriever.search(QUERIES, 4)), exact_search(shards, queries, 4), queries
    ):
        assert {hit.passage.id for hit in hits} == {passages[row].id for row in rows}
        assert [hit.score for hit in hits] == pytest.approx((vectors[rows] @ query).tolist(), abs=1e-3)
        by_id = {passage.id: passage for passage in passages}
        assert all(hit.passage.text == by_id[hit.passage.id].text for hit in hits)
    assert upload_passages(config, config.qdrant, client) == 40  # again: the same points


def test_another_schema_another_version_and_no_collection_are_clear(config, client):
    retriever = QdrantRetriever(config.qdrant, client)
    client.set_payload("wiki", {"vectors_version": "other"}, points=list(range(40)))
    with pytest.raises(RetrievalError, match="holds vectors other, expected"):
        retriever.find(QUERIES, 1)
    client.delete_payload("wiki", ["text"], points=list(range(40)))
    with pytest.raises(
        RetrievalError, match=r"without the text field 'text' \(it has passage_id, title, vectors_version\)"
    ):
        retriever.find(QUERIES, 1)
    client.delete_collection("wiki")
    with pytest.raises(RetrievalError, match="'wiki' at http://127.0.0.1:6333 gave no answer"):
        retriever.find(QUERIES, 1)
    client.create_collection("wiki", vectors_config=models.VectorParams(size=3, distance=models.Distance.DOT))
    with pytest.raises(DataError, match="refused the upload"):
        upload_passages(config, config.qdrant, client)


def test_vectors_of_other_passages_are_not_uploaded(config, tmp_path):
    write_table(tmp_path / "passages", [SourcedPassage(id="1", title="", text="x")], Origin())
    with pytest.raises(DataError, match="holds vectors of other passages"):
        upload_passages(
            dataclasses.replace(config, passages=str(tmp_path / "passages")),
            config.qdrant,
            QdrantClient(":memory:"),
        )


def test_passages_come_from_one_place(config):
    @dataclasses.dataclass
    class Holder:
        retriever: RetrieverConfig

    check_ranges(Holder(RetrieverConfig(qdrant=config.qdrant)))
    for options, found in [({}, "none"), ({"corpus": "c", "qdrant": config.qdrant}, "corpus and qdrant")]:
        with pytest.raises(
            ConfigError,
            match=f"retriever.corpus, .endpoints, .qdrant, .opensearch, .web, .function: found {found}",
        ):
            check_ranges(Holder(RetrieverConfig(**options)))


@pytest.mark.parametrize(("deadline_s", "timeout"), [(0.2, 1), (2.5, 3), (60.0, 60)])
def test_a_deadline_is_rounded_up_to_the_clients_whole_seconds(deadline_s, timeout, monkeypatch):
    asked = []
    monkeypatch.setattr(qdrant, "QdrantClient", lambda **options: asked.append(options["timeout"]))
    qdrant.connect(QdrantConfig(url="http://127.0.0.1:1", collection="c", vectors="v", deadline_s=deadline_s))
    assert asked == [timeout]
