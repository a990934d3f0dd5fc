"""Passages between the stages: order, shards, chunks, and nothing half-written."""

import random

import pytest

from data_prep.passages import runs as runs_module
from data_prep.passages import table as table_module
from data_prep.passages.chunk import ChunkConfig, chunk_passages, cut, sentence_spans, word_spans
from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.runs import SortedRuns, Taken
from data_prep.passages.sourced import SourcedPassage, from_batch
from data_prep.passages.table import Origin, PassageTable, write_table
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from tests.retrieval.fakes_encoder import tiny_encoder


def _passages(size, seed=0):
    rows = [
        SourcedPassage(id=f"{n}", title=f"t{n}", text=f"kalo é{n}", source="s", license="MIT")
        for n in range(size)
    ]
    random.Random(seed).shuffle(rows)
    return rows


@pytest.fixture
def small_pieces(monkeypatch):
    """Shards and spills of a few rows, so that every path is walked."""
    monkeypatch.setattr(table_module, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(table_module, "ROWS_PER_SHARD", 32)
    monkeypatch.setattr(table_module, "ROWS_PER_RUN", 16)
    monkeypatch.setattr(runs_module, "_READ_ROWS", 3)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100])
def test_any_order_gives_the_same_sorted_directory(tmp_path, small_pieces, size):
    expected = sorted(_passages(size), key=lambda passage: passage.id)
    versions = {write_table(tmp_path / f"{seed}", _passages(size, seed), Origin()) for seed in range(3)}
    assert len(versions) == 1
    table = PassageTable(tmp_path / "0")
    assert (list(table), len(table)) == (expected, size)
    assert (table.manifest.sources, table.manifest.licenses, table.version) == (
        ("s",),
        ("MIT",),
        versions.pop(),
    )
    assert sorted(table.manifest.files) == [f"passages-{n:05d}.parquet" for n in range(-(-size // 32))]
    for start, stop in [(0, size), (size // 3, size), (size // 2, size // 2 + 1), (size, size)]:
        assert [row for batch in table.batches(start, stop) for row in from_batch(batch)] == expected[
            start:stop
        ]


@pytest.mark.parametrize("start", [None, "0", "17", "170", "9", "99"])
def test_runs_merge_from_any_id_on(tmp_path, small_pieces, start):
    runs = SortedRuns(tmp_path / "runs")
    runs.extend((Taken(passages=(row,), place=f"f:{n}") for n, row in enumerate(_passages(50))), 16)
    in_order = sorted(_passages(50), key=lambda passage: passage.id)
    assert list(runs.merged(start)) == [row for row in in_order if start is None or row.id >= start]
    assert len(list((tmp_path / "runs").glob("*.arrow"))) == 4
    assert dict(runs.places()) == {row.id: f"f:{n}" for n, row in enumerate(_passages(50))}
    assert (runs.num_read, runs.num_rows, runs.labels("licenses")) == (50, 50, ("MIT",))


def test_a_failure_leaves_nothing(tmp_path, small_pieces):
    for rows, message in [(_passages(40) + _passages(1), "found '0' twice"), ([], "no passage to write")]:
        with pytest.raises(DataError, match=message):
            write_table(tmp_path / "out", rows, Origin())
        assert list(tmp_path.iterdir()) == []
    write_table(tmp_path / "out", _passages(1), Origin())
    with pytest.raises(DataError, match="exists"):
        write_table(tmp_path / "out", _passages(1), Origin())


def test_an_index_of_a_directory_is_that_of_its_rows(tmp_path):
    write_table(tmp_path / "passages", _passages(30), Origin())
    build_index(IndexConfig(passages=str(tmp_path / "passages"), output=str(tmp_path / "corpus")))
    retriever = CorpusRetriever(tmp_path / "corpus", SearchConfig())
    table = PassageTable(tmp_path / "passages")
    assert [(passage.id, passage.text) for passage in retriever.passages] == [
        (row.id, row.text) for row in table
    ]
    assert retriever.manifest.made_from == {"passages": table.version}
    assert (retriever.manifest.sources, retriever.manifest.licenses) == (("s",), ("MIT",))
    assert retriever.find(["t17"], 1)[0][0].passage.id == "17"


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    for name in ("passages.partial", "corpus.partial"):
        (tmp_path / name / "bm25").mkdir(parents=True)
        (tmp_path / name / "bm25/rows.npy").write_bytes(b"half")
    write_table(tmp_path / "passages", _passages(5), Origin())
    paths = {"passages": str(tmp_path / "passages")}
    version = build_index(IndexConfig(**paths, output=str(tmp_path / "corpus")))
    assert build_index(IndexConfig(**paths, output=str(tmp_path / "again"))) == version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "corpus", "passages"]


@pytest.mark.parametrize("directory", ["passages", "corpus"])
def test_a_directory_of_another_stage_is_named(tmp_path, directory):
    write_table(tmp_path / "passages", _passages(3), Origin())
    build_index(IndexConfig(passages=str(tmp_path / "passages"), output=str(tmp_path / "corpus")))
    if directory == "passages":
        with pytest.raises(
            DataError, match=r"passages holds passages, expected corpus; make it with `sd-search data index`"
        ):
            CorpusRetriever(tmp_path / "passages", SearchConfig())
    else:
        with pytest.raises(
            DataError, match=r"corpus holds corpus, expected passages; make it with `sd-search data import`"
        ):
            PassageTable(tmp_path / "corpus")


TEXT = "Ed Wood (b. 1924) made films.  Was he good? “No!” Said e.g. critics…\nHe died in 1978."


def test_spans_of_words_and_sentences():
    assert word_spans(" a  bc\n") == [(1, 2), (4, 6)]
    sentences = [TEXT[start:stop] for start, stop in sentence_spans(TEXT)]
    assert sentences == [
        "Ed Wood (b.",
        "1924) made films.",
        "Was he good?",
        "“No!”",
        "Said e.g. critics…\nHe died in 1978.",
    ]
    assert sentence_spans("") == [] == sentence_spans("  ")


@pytest.mark.parametrize(("size", "stride"), [(3, 3), (3, 1), (3, 2), (5, 4), (100, 100)])
def test_chunks_cover_every_word_in_order(size, stride):
    words = [f"w{n}" for n in range(11)]
    passage = SourcedPassage(id="p", title="t", text=" ".join(words), source="s")
    chunks = list(cut(passage, word_spans(passage.text), size=size, stride=stride))
    if size >= 11:
        assert chunks == [passage]
        return
    assert [chunk.id for chunk in chunks] == [f"p#{n:04d}" for n in range(len(chunks))]
    for number, chunk in enumerate(chunks):
        assert chunk.text.split() == words[number * stride : number * stride + size]
        assert (chunk.title, chunk.source) == ("t", "s")
    assert chunks[-1].text.endswith("w10") and not chunks[-2].text.endswith("w10")


def test_chunked_directories(tmp_path):
    rows = [
        SourcedPassage(id=id_, title="t", text=text)
        for id_, text in [("1", "a b c d e"), ("1 x", "f"), ("10", "g h i")]
    ]
    write_table(tmp_path / "p", rows, Origin())
    version = chunk_passages(ChunkConfig(passages=str(tmp_path / "p"), output=str(tmp_path / "c"), size=2))
    table = PassageTable(tmp_path / "c")
    assert [(row.id, row.text) for row in table] == [
        ("1 x", "f"),
        ("1#0000", "a b"),
        ("1#0001", "c d"),
        ("1#0002", "e"),
        ("10#0000", "g h"),
        ("10#0001", "i"),
    ]
    assert table.version == version
    assert table.manifest.settings == {"chunks": {"unit": "words", "size": 2, "stride": 2}}
    refused = [
        ({"stride": 3}, "stride: found 3, expected 1 to size 2"),
        ({"unit": "tokens"}, "tokenizer: found nothing"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            chunk_passages(
                ChunkConfig(
                    passages=str(tmp_path / "p"), output=str(tmp_path / "x"), **({"size": 2} | options)
                )
            )


def test_chunks_of_tokens_are_slices_of_the_text(tmp_path):
    tiny_encoder(tmp_path / "encoder")
    write_table(tmp_path / "p", [SourcedPassage(id="1", title="t", text="kalo dava, sul  miren")], Origin())
    options = {"unit": "tokens", "size": 2, "stride": 1, "tokenizer": str(tmp_path / "encoder")}
    chunk_passages(ChunkConfig(passages=str(tmp_path / "p"), output=str(tmp_path / "c"), **options))
    assert [row.text for row in PassageTable(tmp_path / "c")] == ["kalo dava", "dava,", ", sul", "sul  miren"]
