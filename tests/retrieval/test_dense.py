"""Vector search with the real FAISS and a small real encoder, against brute force in numpy; hybrid ranking;
recall."""

import asyncio
import json
import shutil

import numpy as np
import pytest
import torch

from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.index_sizes import IndexSizesConfig, estimates, render_plan
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, write_table
from data_prep.vectors.encode import EncodeConfig, encode_passages
from data_prep.vectors.vector_index import (
    VectorIndexConfig,
    check_trainable,
    exact_search,
    factory_string,
    num_codes,
    num_lists,
    recall,
)
from data_prep.vectors.vectors import VectorShards
from megatron_sd.config import RetrieverConfig, SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Hit, Passage
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.corpus import directory
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.corpus.faiss_index import sorted_ranking
from megatron_sd.retrieval.corpus.fusion import Ranking, merge_shards, reciprocal_rank_fusion
from megatron_sd.retrieval.corpus.manifest import MANIFEST_NAME, file_entries
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

KINDS = ("flat", "fp16", "sq8", "hnsw", "hnsw_sq8", "ivf_pq")
QUERIES = ["kalo 17", "dava sul", "pergo", "rask lunet 80"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """passages (300), encoder and vectors."""
    folder = tmp_path_factory.mktemp("dense")
    texts = [f"{WORDS[n // 8 % 8]} {n} {WORDS[n * 5 % 7]}" for n in range(299)]
    rows = [SourcedPassage(id=f"{n:03d}", title=WORDS[n % 8], text=text) for n, text in enumerate(texts)]
    write_table(
        folder / "passages", [*rows, SourcedPassage(id="same", title=rows[7].title, text=texts[7])], Origin()
    )
    tiny_encoder(folder / "encoder")
    paths = {"passages": f"{folder}/passages", "encoder": f"{folder}/encoder", "output": f"{folder}/vectors"}
    encode_passages(EncodeConfig(**paths, max_tokens=24, rows_per_shard=64, devices=("cpu",)))
    for kind in KINDS:
        _build(folder, kind)
    return folder


def _build(folder, kind, **options):
    paths = {"passages": f"{folder}/passages", "vectors": f"{folder}/vectors", "output": f"{folder}/{kind}"}
    build_index(IndexConfig(**paths, vector_index=VectorIndexConfig(kind=kind, **options)))


def _open(path, **search):
    return CorpusRetriever(path, SearchConfig(device="cpu", **search))


def _vectors(folder):
    return np.concatenate(list(VectorShards(folder / "vectors").blocks(1000)))


def test_exact_indexes_find_what_brute_force_finds(folder):
    vectors = _vectors(folder)
    for kind in ("flat", "fp16"):
        retriever = _open(folder / kind)
        assert retriever.method == "dense"  # auto: it has vectors
        queries = retriever._indexes[0].encoder.encode_queries(QUERIES)
        scores = queries @ vectors.T
        for hits, own in zip(retriever.find(QUERIES, 5), scores, strict=True):
            best = sorted(range(300), key=lambda row: (-own[row], row))[:5]
            assert [hit.score for hit in hits] == pytest.approx(own[best].tolist(), abs=2e-3)
            # near ties may swap
            assert len({hit.passage.id for hit in hits} & {retriever.passages[row].id for row in best}) >= 4
            assert hits == tuple(sorted(hits, key=lambda hit: (-hit.score, hit.passage.id)))


def test_equal_vectors_are_ordered_by_id(folder):
    one, other = VectorShards(folder / "vectors").take(np.array([7, 299]))
    assert np.array_equal(one, other)
    for hits in _open(folder / "flat").find(QUERIES, 300):
        ids = [hit.passage.id for hit in hits]
        assert ids.index("same") == ids.index("007") + 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_close_to_exact_search(folder, kind):
    retriever = _open(folder / kind, effort=300 if kind.startswith("hnsw") else 4)
    queries = retriever._indexes[0].encoder.encode_queries(QUERIES)
    exact = exact_search(VectorShards(folder / "vectors"), queries, 10)
    found = [list(ranking.rows) for ranking in retriever._indexes[0].rank(QUERIES, 10)]
    assert (
        recall(found, exact)
        >= {"flat": 1.0, "fp16": 0.95, "sq8": 0.8, "hnsw": 0.95, "hnsw_sq8": 0.8, "ivf_pq": 0.6}[kind]
    )


def test_recall_is_reported_on_request(folder, tmp_path, caplog):
    rows = [
        json.dumps({"id": str(n), "text": query, "golden_answers": ["x"]}) for n, query in enumerate(QUERIES)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    paths = {"passages": f"{folder}/passages", "vectors": f"{folder}/vectors", "output": f"{tmp_path}/corpus"}
    with caplog.at_level("INFO"):
        build_index(
            IndexConfig(**paths, vector_index=VectorIndexConfig(kind="flat"), recall=f"{tmp_path}/q.jsonl")
        )
    assert "recall@10 of the vector index against exact search: 1.0000" in caplog.text


def test_deterministic_kinds_give_the_same_bytes_again(folder, tmp_path):
    for kind in ("sq8", "ivf_pq"):
        before = file_entries(folder / kind)
        shutil.move(folder / kind, tmp_path / kind)
        _build(folder, kind)
        assert file_entries(folder / kind) == before


def test_more_than_there_are_gives_all_and_none_for_nothing(folder):
    retriever = _open(folder / "flat")
    assert len(retriever.find(["kalo"], 1000)[0]) == 300
    assert retriever.find([], 3) == []
    with pytest.raises(ConfigError, match=r"retriever\.top_k: found 301, expected at most 300"):
        open_retriever(RetrieverConfig(corpus=str(folder / "flat"), top_k=301))


def test_hybrid_ranks_by_both(folder):
    hybrid, bm25, dense = (_open(folder / "flat", method=method) for method in ("hybrid", "bm25", "dense"))
    for query in QUERIES:
        rankings = [retriever._indexes[0].rank([query], 100)[0] for retriever in (bm25, dense)]
        expected = reciprocal_rank_fusion(rankings, 5, constant=60)
        (hits,) = hybrid.find([query], 5)
        assert [hit.passage for hit in hits] == hybrid.passages.take(expected.rows)
        assert [hit.score for hit in hits] == expected.scores


def test_reciprocal_rank_fusion_by_hand():
    rankings = [Ranking(rows=[5, 2, 9], scores=[3, 2, 1]), Ranking(rows=[2, 7], scores=[1, 1])]
    fused = reciprocal_rank_fusion(rankings, 3, constant=60)
    assert fused.rows == [2, 5, 7]
    assert fused.scores == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_merged_shards_are_the_unsharded_result(folder):
    """Exact: every split of the corpus, merged, is the search over all of it."""
    (whole,) = _open(folder / "flat").find(["kalo dava"], 300)
    for num_shards in (1, 2, 5):
        shards = [
            tuple(hit for hit in whole if sum(map(ord, hit.passage.id)) % num_shards == n)[:7]
            for n in range(num_shards)
        ]
        assert merge_shards(shards, 7) == whole[:7]
    tied = [Hit(passage=Passage(id=id_, title="", text=""), score=1.0) for id_ in "bac"]
    assert [hit.passage.id for hit in merge_shards([tied[:2], tied[2:]], 2)] == ["a", "b"]


def test_missing_results_of_faiss_are_no_passages():
    ranking = sorted_ranking(np.array([4, 2, -1]), np.array([1.0, 1.0, -3e38], np.float32))
    assert (ranking.rows, ranking.scores) == ([2, 4], [1.0, 1.0])


def test_a_method_the_corpus_was_not_built_for_is_refused(folder, tmp_path):
    build_index(IndexConfig(passages=f"{folder}/passages", output=str(tmp_path / "bm25")))
    assert _open(tmp_path / "bm25").method == "bm25"
    with pytest.raises(ConfigError, match="search.method: found 'hybrid'.*no dense index"):
        _open(tmp_path / "bm25", method="hybrid")
    paths = {"passages": f"{folder}/passages", "vectors": f"{folder}/vectors", "output": f"{tmp_path}/dense"}
    build_index(IndexConfig(**paths, bm25=False))
    with pytest.raises(ConfigError, match="search.method: found 'bm25'.*no bm25 index"):
        _open(tmp_path / "dense", method="bm25")


def test_a_rank_reads_no_million_vectors_for_a_query(folder, monkeypatch):
    """300 here. A service of its own may, and BM25 and graphs read few."""
    monkeypatch.setattr(directory, "MOST_SCANNED", 299)
    for kind in ("flat", "fp16", "sq8"):
        with pytest.raises(
            ConfigError, match=f"300 vectors of kind {kind} in .*retriever.endpoints, or build"
        ):
            CorpusRetriever(folder / kind, SearchConfig(method="dense"), shares_gpus=True)
    assert _open(folder / "flat").method == "dense"
    CorpusRetriever(folder / "flat", SearchConfig(method="bm25"), shares_gpus=True)
    CorpusRetriever(folder / "hnsw", SearchConfig(method="dense", device="cpu"), shares_gpus=True)
    own = RetrieverConfig(corpus=str(folder / "flat"), search=SearchConfig(method="dense", device="cpu"))
    with pytest.raises(ConfigError, match="300 vectors of kind flat"):
        open_retriever(own)
    assert open_retriever(own, alone=True).method == "dense"  # as `data recall` does
    monkeypatch.setattr(directory, "MOST_SCANNED", 300)
    CorpusRetriever(folder / "flat", SearchConfig(method="dense", device="cpu"), shares_gpus=True)


def test_an_encoder_of_another_dimension_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder / "flat", tmp_path / "broken")
    tiny_encoder(broken / "dense/encoder", dim=16)
    manifest = json.loads((broken / MANIFEST_NAME).read_text())
    (broken / MANIFEST_NAME).unlink()
    manifest["files"] = {name: vars(entry) for name, entry in file_entries(broken).items()}
    (broken / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="vectors have 32 dimensions, its encoder 16"):
        _open(broken)


def test_search_is_asynchronous_too(folder):
    retriever = _open(folder / "flat")
    assert asyncio.run(retriever.search(QUERIES, 2)) == retriever.find(QUERIES, 2)


def test_names_and_sizes_of_indexes():
    auto = VectorIndexConfig(kind="ivf_pq")
    assert factory_string(auto, 21_000_000, 768) == "IVF16384,PQ192x4fs,Refine(SQ8)"
    assert num_lists(auto, 200_000) == 2048
    assert num_lists(auto, 100) == 2
    assert num_codes(384) == 96 and num_codes(30) == 6
    with pytest.raises(ConfigError, match="num_lists: found 500, expected 1 to 100"):
        num_lists(VectorIndexConfig(kind="ivf_pq", num_lists=500), 100)


def test_too_few_vectors_for_lists_are_said_before_anything_is_built(tmp_path):
    rows = [SourcedPassage(id=f"{n}", title="", text=WORDS[n % 8]) for n in range(10)]
    write_table(tmp_path / "p", rows, Origin())
    paths = {
        "passages": f"{tmp_path}/p",
        "output": f"{tmp_path}/v",
        "encoder": str(tiny_encoder(tmp_path / "e")),
    }
    encode_passages(EncodeConfig(**paths, max_tokens=16))
    paths = {"passages": f"{tmp_path}/p", "vectors": f"{tmp_path}/v", "output": f"{tmp_path}/c"}
    with pytest.raises(
        DataError, match=r"ivf_pq: found 10 vectors, expected at least 16 to train 1 lists.*choose kind flat"
    ):
        build_index(IndexConfig(**paths, vector_index=VectorIndexConfig(kind="ivf_pq")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "p", "v"]
    few = VectorIndexConfig(kind="ivf_pq", num_lists=100, training_rows=50)
    with pytest.raises(
        DataError, match="found training_rows 50 of 300 vectors, expected at least 100 to train 100 lists"
    ):
        check_trainable(300, few)
    check_trainable(16, VectorIndexConfig(kind="ivf_pq"))
    check_trainable(1, VectorIndexConfig(kind="hnsw"))


def test_the_plan_agrees_with_arithmetic_and_refuses_nonsense():
    config = IndexSizesConfig(passages=21e6, dim=768)
    found = {estimate.name: estimate for estimate in estimates(config)}
    text_gb = found["bm25"].ram_gb - 21e6 * 100 * 7.4 / 1e9
    assert found["flat"].ram_gb - text_gb == pytest.approx(21e6 * 768 * 4 / 1e9)
    assert found["hnsw_sq8"].ram_gb - text_gb == pytest.approx(21e6 * (768 + 272) / 1e9)
    assert found["flat"].qps < 10 < 1700 < found["hnsw_sq8"].qps
    table = render_plan(config, list(found.values()))
    assert "HNSW32,SQ8" in table and "21,000,000 passages" in table
    with pytest.raises(ConfigError, match="passages: found 0"):
        estimates(IndexSizesConfig(passages=0))
