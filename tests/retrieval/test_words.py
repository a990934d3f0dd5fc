"""Words by a pattern: what is no pattern, and scripts that put no spaces between words."""

import re
from pathlib import Path

import pytest

from data_prep.passages.index import IndexConfig, Labels, bm25_settings, build_index, write_corpus
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError
from megatron_sd.records import Passage
from megatron_sd.retrieval.corpus.bm25 import Analyzer
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from megatron_sd.retrieval.corpus.words import is_uncut

DOCS = Path(__file__).parents[2] / "docs/retrieval.md"
TEXTS = {
    "cn": ("北京市", "北京是中华人民共和国的首都，位于华北平原。"),
    "cn2": ("上海市", "上海是中国最大的城市，靠近东海。iPhone手机在这里出售。"),
    "jp": ("富士山", "富士山は日本で一番高い山です。"),
    "th": ("กรุงเทพ", "กรุงเทพเป็นเมืองหลวงของประเทศไทย"),
    "en": ("", "Kalo guides Dava."),
}
QUERIES = {
    "北京是哪个国家的首都": "cn",
    "手机": "cn2",
    "日本で一番高い山は何ですか": "jp",
    "เมืองหลวงของไทย": "th",
    "iphone": "cn2",
    "kalo": "en",
}


def _documented_pattern():
    return re.search(r"--token_pattern '(.+)'", DOCS.read_text())[1]


def _corpus(path, pattern=None, texts=TEXTS):
    given = {} if pattern is None else {"token_pattern": pattern}
    passages = [Passage(id=id_, title=title, text=text) for id_, (title, text) in texts.items()]
    write_corpus(path, passages, bm25_settings(IndexConfig(passages="", output="", **given)), Labels())
    return CorpusRetriever(path, SearchConfig())


def test_the_documented_pattern_finds_passages_without_spaces(tmp_path, caplog):
    retriever = _corpus(tmp_path / "c", _documented_pattern())
    assert {query: retriever.find([query], 1)[0][0].passage.id for query in QUERIES} == QUERIES
    assert "token_pattern" not in caplog.text


def test_the_default_pattern_finds_none_of_them_and_says_so(tmp_path, caplog):
    retriever = _corpus(tmp_path / "c")
    default = IndexConfig(passages="", output="").token_pattern
    (record,) = caplog.records
    scripts = "mainly in a script without spaces (Chinese, Japanese, Thai, ...)"
    assert record.getMessage().startswith(
        f"4 of 5 passages are {scripts}, and token_pattern {default!r} makes whole clauses"
    )
    assert retriever.find(["北京是哪个国家的首都", "日本で一番高い山は何ですか"], 1) == [(), ()]
    assert [own.getMessage().split(" mainly")[0] for own in caplog.records[1:]] == [
        "the query '北京是哪个国家的首都' is"
    ]


def test_a_few_of_them_among_english_ones_are_no_reason_to_warn(tmp_path, caplog):
    _corpus(
        tmp_path / "c", texts={"cn": TEXTS["cn"], **{f"{n}": ("", "Kalo guides Dava.") for n in range(3)}}
    )
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("北京是哪个国家的首都", ["北京是哪个国家的首都"], True),
        ("北京是哪个国家的首都", [*"北京是哪个国家的首都"], False),
        ("北京", ["北京"], False),
        ("เมืองหลวงของไทย", [], True),
        ("Beijing (北京市) is a city", ["beijing", "北京市", "city"], False),
        ("서울은 대한민국의 수도이다", ["서울은", "대한민국의", "수도이다"], False),
        ("", [], False),
    ],
)
def test_what_is_uncut(text, words, expected):
    assert is_uncut(text, words) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"\w+(", r"token_pattern: found '\\\\w\+\(' \(missing \), .*expected a regular expression"),
        (r"(\w)(\w+)", "with 2 groups, expected none: its whole match is the word"),
        (r"\w*", "which matches no text at all, expected one that needs a character"),
    ],
)
def test_a_bad_pattern_is_said_before_anything_is_read(tmp_path, pattern, message):
    with pytest.raises(ConfigError, match=message):
        build_index(
            IndexConfig(passages=str(tmp_path / "absent"), output=str(tmp_path / "c"), token_pattern=pattern)
        )
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_capture_are_none():
    settings = bm25_settings(
        IndexConfig(passages="", output="", token_pattern=r"(?:[a-z]|\d)+", stemmer="none")
    )
    assert Analyzer(settings).terms("Kalo2 dava") == ["kalo2", "dava"]
