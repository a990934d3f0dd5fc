"""Retrieval figures on a corpus whose answers are known by hand."""

import asyncio

import pytest

from data_prep.passages.index import IndexConfig, Labels, bm25_settings, write_corpus
from eval.retrieval import RetrievalFigures, measure, render
from megatron_sd.config import SearchConfig
from megatron_sd.errors import DataError
from megatron_sd.records import Passage, Question
from megatron_sd.retrieval.corpus.directory import CorpusRetriever


def _question(id_, text, source, *supporting):
    return Question(id=id_, text=text, golden_answers=("x",), source=source, supporting=supporting)


def test_measure(tmp_path):
    passages = [
        Passage(id=str(i), title=title, text="")
        for i, title in enumerate(("kalo", "kalo miren", "dava", "sul"))
    ]
    settings = bm25_settings(IndexConfig(passages="", output=""))
    write_corpus(tmp_path / "corpus", passages, settings, Labels())
    questions = [
        _question("a", "kalo", "one", ("0",), ("2",)),
        _question("b", "dava sul", "one", ("2",), ("1", "3")),
        _question("c", "miren", "two", ("0",)),
        _question("d", "miren", "two"),
    ]
    figures = asyncio.run(measure(CorpusRetriever(tmp_path / "corpus", SearchConfig()), questions, 2))
    assert figures == [
        RetrievalFigures(source="one", num_questions=2, sup=0.75, all=0.5),
        RetrievalFigures(source="two", num_questions=1, sup=0.0, all=0.0),
    ]
    assert "| one | 2 | 0.750 | 0.500 |" in render(figures)
    with pytest.raises(DataError, match=r"none of the 1 questions names a passage .* with --passages"):
        asyncio.run(measure(CorpusRetriever(tmp_path / "corpus", SearchConfig()), questions[3:], 2))
