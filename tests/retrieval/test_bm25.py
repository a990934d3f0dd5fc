"""BM25 against a brute-force computation of Lucene's formula, and corpus directories against damage."""

import asyncio
import dataclasses
import json
import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.passages.index import IndexConfig, Labels, bm25_settings, build_index, write_corpus
from data_prep.passages.inspect import InfoConfig, corpus_info
from data_prep.passages.table import to_batches
from data_prep.sources.jsonl import write_rows
from megatron_sd.config import SearchConfig
from megatron_sd.errors import DataError, RetrievalError
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.bm25 import Analyzer
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.corpus.passages import PassageStore, write_batches

PLAIN = bm25_settings(
    IndexConfig(passages="", output="", stop_words="none", stemmer="none", token_pattern=r"\w+", k1=1.2)
)
ENGLISH = bm25_settings(IndexConfig(passages="", output=""))
TEXTS = {
    "p03": "kalo miren guides dava",
    "p01": "dava sul guides kalo kalo",
    "p02": "kalo miren guides dava",
    "p10": "nothing to see",
    "p00": "guides",
}


def _corpus(path, texts=TEXTS, index_settings=PLAIN):
    passages = [Passage(id=id_, title="", text=text) for id_, text in texts.items()]
    write_corpus(path, passages, index_settings, Labels(sources=("test",), licenses=("CC0-1.0",)))
    return path


def _open(path):
    return CorpusRetriever(path, SearchConfig())


def _search(retriever, *queries, top_k=3):
    hits = asyncio.run(retriever.search(queries, top_k))
    return [[(hit.passage.id, hit.score) for hit in found] for found in hits]


def _lucene(query, texts, k1, b):
    """Lucene's BM25 in float64: sum over query terms of ln(1 + (N - n + .5) / (n + .5)) * f / (f + k1 (1 -
    b + b l / avg l))."""
    words = {id_: text.split() for id_, text in texts.items()}
    average = sum(map(len, words.values())) / len(words)
    totals = {}
    for id_, own in words.items():
        counts = Counter(own)
        total = 0.0
        for term in query.split():
            num_holding = sum(term in other for other in words.values())
            if counts[term]:
                idf = math.log(1 + (len(words) - num_holding + 0.5) / (num_holding + 0.5))
                total += idf * counts[term] / (counts[term] + k1 * (1 - b + b * len(own) / average))
        if total:
            totals[id_] = total
    return totals


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return _open(_corpus(tmp_path_factory.mktemp("bm25") / "corpus"))


def test_scores_are_lucenes(retriever):
    (hits,) = _search(retriever, "kalo guides dava", top_k=10)
    expected = _lucene("kalo guides dava", TEXTS, PLAIN.k1, PLAIN.b)
    assert dict(hits) == pytest.approx(expected, rel=1e-5)
    assert [score for _, score in hits] == sorted(dict(hits).values(), reverse=True)


def test_ties_go_to_the_smaller_id(retriever):
    (hits,) = _search(retriever, "miren", top_k=2)
    assert [id_ for id_, _ in hits] == ["p02", "p03"]
    assert hits[0][1] == hits[1][1]
    assert [id_ for id_, _ in _search(retriever, "miren", top_k=1)[0]] == ["p02"]


def test_nothing_to_find_gives_no_hits(retriever, tmp_path):
    assert _search(retriever, "", "   ", "zzz ???", "\ud800") == [[], [], [], []]
    english = _open(_corpus(tmp_path / "english", index_settings=ENGLISH))
    assert _search(english, "the of and", "to") == [[], []]


def test_threads_may_share_a_corpus(tmp_path):
    """An evaluation searches while searches of training rollouts are under way. The corpus is large enough for two
    searches to be at work at once."""
    texts = {f"p{n:05d}": f"w{n % 7} w{n % 11} w{n % 13} w{n % 17}" for n in range(30_000)}
    _corpus(tmp_path / "corpus", texts)
    shared = _open(tmp_path / "corpus")
    queries = [f"w{n} w{n + 1}" for n in range(16)]
    alone = [shared.find([query], 5) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda query: shared.find([query], 5), queries * 20))
    assert together == alone * 20


def test_top_k_below_one_is_refused(retriever):
    with pytest.raises(RetrievalError, match="top_k is 0"):
        _search(retriever, "kalo", top_k=0)


words = st.sampled_from(["kalo", "dava", "sul", "miren", "to"])
texts_of_words = st.lists(st.lists(words, max_size=5).map(" ".join), min_size=1, max_size=12)
queries_of_words = st.lists(words, min_size=1, max_size=4).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(texts_of_words, queries_of_words)
def test_search_equals_brute_force(tmp_path_factory, texts, query):
    if not any(texts):
        return
    named = {f"p{i:02}": text for i, text in enumerate(texts)}
    path = _corpus(tmp_path_factory.mktemp("brute") / "corpus", named)
    for top_k in (1, 3, 20):
        (hits,) = _search(_open(path), query, top_k=top_k)
        expected = _lucene(query, named, PLAIN.k1, PLAIN.b)
        assert len(hits) == min(top_k, len(expected))
        assert [score for _, score in hits] == pytest.approx(
            sorted(expected.values(), reverse=True)[:top_k], rel=1e-5
        )
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))
    shutil.rmtree(path.parent)


def test_order_of_passages_does_not_matter(tmp_path):
    first = _corpus(tmp_path / "a")
    second = _corpus(tmp_path / "b", dict(sorted(TEXTS.items())))
    for name in ("manifest.json", "passages.arrow", "bm25/scores.npy", "bm25/vocabulary.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert _open(first).corpus_version == _open(second).corpus_version


def test_analyzer_settings():
    assert Analyzer(ENGLISH).terms("The guides are Guiding A I x") == ["guid", "guid"]
    assert Analyzer(PLAIN).terms("The guides x") == ["the", "guides", "x"]


def test_queries_are_read_with_the_settings_of_the_index(tmp_path):
    path = _corpus(tmp_path / "corpus", {"1": "She guides them"}, ENGLISH)
    assert [id_ for id_, _ in _search(_open(path), "guiding")[0]] == ["1"]


def _damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _damage_empty(path):
    path.write_bytes(b"")


FILES = ["passages.arrow", "bm25/scores.npy", "bm25/rows.npy", "bm25/starts.npy", "bm25/vocabulary.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [_damage_flip, _damage_truncate, _damage_empty, lambda path: path.unlink()]
)
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = _corpus(tmp_path / "corpus")
    damage(path / name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        _open(path)


def _edit_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_damaged_manifest_is_refused(tmp_path):
    path = _corpus(tmp_path / "corpus")
    files = json.loads((path / "manifest.json").read_text())["files"]
    for changes, message in [
        ({"format": "other"}, "format 'other'"),
        ({"unknown": 1}, "corrupt"),
        ({"settings": {"bm25": {"k1": 1}}}, "settings"),
        ({"files": files | {"../x": {"num_bytes": 1, "xxh3_128": "0"}}}, "outside"),
        ({"files": {}}, "does not list"),
    ]:
        broken = tmp_path / "broken"
        shutil.copytree(path, broken)
        _edit_manifest(broken, **changes)
        with pytest.raises(DataError, match=message):
            _open(broken)
        shutil.rmtree(broken)
    (path / "manifest.json").write_text('{"format"')
    with pytest.raises(DataError, match="corrupt"):
        _open(path)
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="sd-search data index"):
        _open(path)
    with pytest.raises(DataError, match="not a corpus directory"):
        _open(tmp_path / "nowhere")


def test_manifest_says_what_the_corpus_holds(tmp_path):
    manifest = json.loads((_corpus(tmp_path / "corpus") / "manifest.json").read_text())
    assert manifest["num_passages"] == 5
    assert manifest["licenses"] == ["CC0-1.0"]
    assert manifest["settings"] == {"bm25": dataclasses.asdict(PLAIN)}
    assert sorted(manifest["files"]) == sorted(FILES)


def test_build_refuses_an_existing_output_repeated_ids_and_empty_input(tmp_path):
    path = _corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match="exists"):
        _corpus(path)
    twice = [Passage(id="1", title="", text="a")] * 2
    with pytest.raises(DataError, match="unique"):
        write_corpus(tmp_path / "twice", twice, PLAIN, Labels())
    with pytest.raises(DataError, match="no passage holds a term"):
        write_corpus(tmp_path / "empty", [], PLAIN, Labels())
    assert not (tmp_path / "twice").exists()


def test_build_index_from_a_file(tmp_path):
    rows = [{"id": 2, "contents": '"Kalo Miren"\nguides Dava'}, {"id": 1, "title": "Sul", "text": "none"}]
    write_rows(tmp_path / "p.jsonl", rows)
    version = build_index(IndexConfig(passages=str(tmp_path / "p.jsonl"), output=str(tmp_path / "corpus")))
    retriever = _open(tmp_path / "corpus")
    assert retriever.corpus_version == version
    ((hit,),) = asyncio.run(retriever.search(["who is kalo"], 3))
    assert hit.passage == Passage(id="2", title="Kalo Miren", text="guides Dava")


def test_passage_store_takes_rows_across_batches(tmp_path):
    passages = [Passage(id=f"{i:06}", title=f"t{i}", text=f"é{i}") for i in range(9000)]
    write_batches(tmp_path / "p.arrow", to_batches(passages))
    store = PassageStore(tmp_path / "p.arrow")
    assert len(store) == 9000
    assert store.take([8999, 0, 4096, 4095]) == [passages[i] for i in (8999, 0, 4096, 4095)]
    assert list(store) == passages
    with pytest.raises(IndexError):
        store[-1]
    with pytest.raises(IndexError):
        store[9000]


def test_corpus_info(tmp_path):
    path = _corpus(tmp_path / "corpus")
    info = corpus_info(InfoConfig(path=str(path)))
    assert _open(path).corpus_version in info
    assert "passages        5\n" in info
    assert "licences        CC0-1.0" in info
    _damage_flip(path / "bm25/rows.npy")
    with pytest.raises(DataError, match="rows.npy"):
        corpus_info(InfoConfig(path=str(path)))
