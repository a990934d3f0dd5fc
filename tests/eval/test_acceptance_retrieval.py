"""The figures of docs/retrieval.md on real questions, where their files are at hand.

SD_SEARCH_DATA names a folder with corpus.jsonl.zst, questions.jsonl.zst and the mini_hotpot500 files;
SD_SEARCH_ENCODER one with all-MiniLM-L6-v2. Without them the tests say so and are skipped: nothing of the
data belongs to the project.
"""

import os
from pathlib import Path

import pytest

from data_prep.passages.index import IndexConfig, build_index
from data_prep.sources.questions import ImportConfig, import_file
from eval.retrieval import RetrievalConfig, main
from megatron_sd.config import RetrieverConfig, SearchConfig
from tests.retrieval.fakes import quick_client, serving

pytestmark = pytest.mark.slow


def _folder(variable):
    path = Path(os.environ.get(variable, "data"))
    if variable not in os.environ and not (path / "corpus.jsonl.zst").is_file():
        pytest.skip(
            f"{variable} is not set and data/corpus.jsonl.zst does not exist: the real questions are not at"
            " hand"
        )
    return path


def _import(kind, source, output, **options):
    import_file(ImportConfig(kind=kind, input=str(source), output=str(output), **options))
    return str(output)


def _figures(questions, split, **retriever):
    config = RetrievalConfig(retriever=RetrieverConfig(**retriever), questions=questions, split=split)
    return {figures.source: (figures.sup, figures.all) for figures in main(config)}


def test_bm25_on_all_six_sets_in_process_and_served(tmp_path):
    data = _folder("SD_SEARCH_DATA")
    passages = _import("passages", data / "corpus.jsonl.zst", tmp_path / "passages")
    questions = _import("questions", data / "questions.jsonl.zst", tmp_path / "questions.jsonl")
    build_index(IndexConfig(passages=passages, output=str(tmp_path / "corpus")))
    expected = {
        "hotpotqa": (0.634, 0.360),
        "2wikimultihopqa": (0.599, 0.264),
        "musique": (0.392, 0.082),
        "nq": (0.644, 0.644),
        "triviaqa": (0.861, 0.861),
        # bm25s: .779; one question of 172, whose third and fourth passages tie exactly
        "popqa": (0.773, 0.773),
    }
    found = _figures(questions, "eval", corpus=str(tmp_path / "corpus"))
    assert {name: pytest.approx(values, abs=6e-4) for name, values in expected.items()} == found
    with serving(tmp_path / "corpus", tmp_path) as (address, _process):
        assert _figures(questions, "eval", endpoints=(address,), client=quick_client()) == found


def test_minilm_on_the_small_corpus(tmp_path):
    from data_prep.vectors.encode import EncodeConfig, encode_passages
    from data_prep.vectors.vector_index import VectorIndexConfig

    data, encoder = _folder("SD_SEARCH_DATA"), os.environ.get("SD_SEARCH_ENCODER")
    if encoder is None:
        pytest.skip("SD_SEARCH_ENCODER is not set: all-MiniLM-L6-v2 is not at hand")
    passages = _import("passages", data / "mini_hotpot500_corpus_searchr1.jsonl.zst", tmp_path / "passages")
    questions = _import(
        "questions", data / "mini_hotpot500_questions.jsonl.zst", tmp_path / "q.jsonl", passages=passages
    )
    vectors, corpus = str(tmp_path / "vectors"), str(tmp_path / "corpus")
    encode_passages(EncodeConfig(passages=passages, encoder=encoder, output=vectors))
    build_index(
        IndexConfig(
            passages=passages, vectors=vectors, output=corpus, vector_index=VectorIndexConfig(kind="flat")
        )
    )
    with serving(Path(corpus), tmp_path) as (address, _process):
        served = {"endpoints": (address,), "client": quick_client()}
        assert _figures(questions, None, top_k=5, **served)["hotpotqa"][0] == pytest.approx(0.736, abs=0.01)
        assert _figures(questions, None, top_k=10, **served)["hotpotqa"][1] >= 0.654
    bm25 = {"corpus": corpus, "search": SearchConfig(method="bm25")}
    assert _figures(questions, None, top_k=5, **bm25)["hotpotqa"][0] == pytest.approx(0.748, abs=6e-4)
    assert _figures(questions, None, top_k=10, **bm25)["hotpotqa"][1] == pytest.approx(0.788, abs=6e-4)
