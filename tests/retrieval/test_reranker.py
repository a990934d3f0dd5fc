"""A real cross-encoder, small: its scores are those of one pair at a time, and a corpus is shown in its order."""

import asyncio
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, write_table
from megatron_sd.config import RerankConfig, RetrieverConfig, SearchConfig
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.records import Passage
from megatron_sd.retrieval.choice import open_retriever
from megatron_sd.retrieval.reranker import Reranker
from tests.builders import hit
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_cross_encoder, tiny_encoder

CPU = torch.device("cpu")
OPTIONS = {"max_tokens": 64, "batch_size": 3}
PASSAGES = [Passage(id=str(n), title=WORDS[n % 8], text=" ".join(WORDS[: n % 5 + 1])) for n in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_cross_encoder(tmp_path_factory.mktemp("cross"))


def alone(path, query, passage):
    """The logits of one pair, read by transformers without any batch."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    own = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return own(**tokenizer(query, f"{passage.title}\n{passage.text}", return_tensors="pt")).logits[0]


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_are_those_of_one_pair_at_a_time(num_labels, tmp_path):
    path = tiny_cross_encoder(tmp_path / "cross", num_labels)
    found = Reranker(RerankConfig(model=str(path), **OPTIONS), CPU).scores(
        [(WORDS[0], passage) for passage in PASSAGES]
    )
    logits = [alone(path, WORDS[0], passage) for passage in PASSAGES]
    expected = [float(one[0] if num_labels == 1 else one[1] - one[0]) for one in logits]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(set(np.round(found, 4))) > 3


def test_hits_get_the_models_scores_and_order_and_ties_stay(model):
    own = Reranker(RerankConfig(model=str(model), **OPTIONS), CPU)
    twins = [hit("b", "same", "T"), hit("a", "same", "T")]
    hits = [hit(p.id, p.text, p.title) for p in PASSAGES]
    (first, second) = own.rerank([WORDS[0], WORDS[1]], [hits, twins], 3)
    scores = own.scores([(WORDS[0], passage) for passage in PASSAGES])
    best = np.argsort(-scores, kind="stable")[:3]
    assert [one.passage.id for one in first] == [PASSAGES[n].id for n in best]
    np.testing.assert_allclose([one.score for one in first], scores[best], atol=1e-5)
    assert [one.passage.id for one in second] == ["b", "a"]
    assert own.rerank([WORDS[0]], [[]], 3) == [()]


def test_a_corpus_is_searched_deeper_and_shown_in_the_rerankers_order(model, tmp_path):
    texts = [f"{WORDS[n % 6]} {WORDS[n // 6]} x{n}" for n in range(40)]
    rows = [SourcedPassage(id=f"{n:02d}", title="", text=text) for n, text in enumerate(texts)]
    write_table(tmp_path / "passages", rows, Origin())
    build_index(IndexConfig(passages=f"{tmp_path}/passages", output=f"{tmp_path}/corpus", stop_words="none"))
    rerank = RerankConfig(model=str(model), depth=20, **OPTIONS)
    plain, own = (
        open_retriever(RetrieverConfig(corpus=f"{tmp_path}/corpus", search=SearchConfig(rerank=one)))
        for one in (None, rerank)
    )
    deep, shown = plain.find([WORDS[2]], 20)[0], asyncio.run(own.search([WORDS[2]], 3))[0]
    expected = Reranker(rerank, CPU).rerank([WORDS[2]], [deep], 3)[0]
    assert [one.passage.id for one in shown] == [one.passage.id for one in expected]
    assert [one.passage.id for one in shown] != [one.passage.id for one in deep[:3]]
    assert (plain.rerank_depth, own.rerank_depth) == (0, 20)
    versions = {plain.corpus_version, own.corpus_version}
    for other in (
        replace(rerank, depth=21),
        replace(rerank, model=str(tiny_cross_encoder(tmp_path / "b", seed=1))),
    ):
        config = RetrieverConfig(corpus=f"{tmp_path}/corpus", search=SearchConfig(rerank=other))
        versions.add(open_retriever(config).corpus_version)
    assert len(versions) == 4
    moved = shutil.copytree(model, tmp_path / "moved")
    config = RetrieverConfig(
        corpus=f"{tmp_path}/corpus",
        search=SearchConfig(rerank=replace(rerank, model=str(moved), batch_size=2)),
    )
    assert open_retriever(config).corpus_version == own.corpus_version
    assert len(own.find([WORDS[2]], 30)[0]) == len(plain.find([WORDS[2]], 30)[0])


def test_what_is_no_cross_encoder_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="search.rerank.model: found no config.json in"):
        Reranker(RerankConfig(model=str(tmp_path / "absent")), CPU)
    with pytest.raises(DataError, match="lack.*classifier"):
        Reranker(RerankConfig(model=str(tiny_encoder(tmp_path / "plain")), **OPTIONS), CPU)
    with pytest.raises(DataError, match="found 3 classes in .*expected a score, or the classes"):
        Reranker(RerankConfig(model=str(tiny_cross_encoder(tmp_path / "three", 3)), **OPTIONS), CPU)
    with pytest.raises(DataError, match="max_tokens: found 512, expected at most 64, the positions of"):
        Reranker(RerankConfig(model=str(model)), CPU)
    with pytest.raises(ConfigError, match="passage_format: found '{contents}' .*expected {title} and {text}"):
        Reranker(RerankConfig(model=str(model), passage_format="{contents}", **OPTIONS), CPU)


def test_a_depth_out_of_range_is_named():
    search = SearchConfig(rerank=RerankConfig(model="m", depth=0))
    with pytest.raises(ConfigError, match="retriever.search.rerank.depth"):
        check_ranges(SimpleNamespace(retriever=RetrieverConfig(corpus="c", search=search)))
