"""One command from a file of passages to a corpus: what it forecasts, makes, passes over and refuses."""

import gzip
import json
from collections import namedtuple

import pytest

from data_prep.passages import build as parts
from data_prep.passages.build import BuildConfig, build, forecast
from data_prep.vectors.vector_index import VectorIndexConfig
from launch import data, retriever
from megatron_sd.config import SearchConfig
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.retrieval.corpus.directory import CorpusRetriever
from tests.retrieval.fakes import WORDS
from tests.retrieval.fakes_encoder import tiny_encoder

ROWS = 300


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "wiki.jsonl"
    rows = [
        {"id": str(n), "contents": f'"{WORDS[n % 8]}"\n{WORDS[n // 8 % 8]} number {n} of them'}
        for n in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def times(folder):
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != "build.json"
    }


def test_passages_vectors_and_corpus_are_made_and_then_passed_over(texts, tmp_path):
    said = []
    config = BuildConfig(
        input=str(texts),
        output=str(tmp_path / "out"),
        encoder=str(tiny_encoder(tmp_path / "encoder")),
        vector_index=VectorIndexConfig(kind="flat"),
        license="CC0-1.0",
    )
    corpus = build(config, said.append)
    assert said[0].startswith("about 300 passages of 6 words, vectors of 32 numbers at ")
    for method in ("bm25", "dense"):
        own = CorpusRetriever(corpus, SearchConfig(method=method))
        assert len(own.find([f"{WORDS[2]} number 17"], 3)[0]) == 3
    assert list(own.manifest.licenses) == ["CC0-1.0"]
    before = times(tmp_path / "out")
    assert build(config, said.append) == corpus and times(tmp_path / "out") == before


def test_a_build_goes_on_after_the_parts_that_are_there(texts, tmp_path, monkeypatch):
    config = BuildConfig(input=str(texts), output=str(tmp_path / "out"))

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "build_index", killed)
        with pytest.raises(KeyboardInterrupt):
            build(config, print)
    monkeypatch.setattr(parts, "import_file", killed)  # it is there
    assert build(config, print) == tmp_path / "out" / "corpus"
    with pytest.raises(
        DataError, match=r"was begun with another license \(.*build.json\): choose another output"
    ):
        build(BuildConfig(input=str(texts), output=str(tmp_path / "out"), license="MIT"), print)


def test_a_changed_input_is_no_corpus_that_is_there(texts, tmp_path):
    config = BuildConfig(input=str(texts), output=str(tmp_path / "out"))
    build(config, print)
    texts.write_text(texts.read_text().replace("number 7 ", "number 8 "))
    with pytest.raises(DataError, match="was begun with another contents"):
        build(config, print)


def test_a_dry_run_only_says(texts, tmp_path):
    said = []
    assert (
        build(BuildConfig(input=str(texts), output=str(tmp_path / "out"), dry_run=True), said.append) is None
    )
    assert len(said) == 3 and not (tmp_path / "out").exists()
    assert said[0] == "about 300 passages of 6 words"


def test_a_long_file_is_estimated_from_its_first_rows(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SAMPLED_ROWS", 100)
    found = forecast(BuildConfig(input=str(texts), output=str(tmp_path / "out")))
    assert found.passages == pytest.approx(ROWS, rel=0.2) and found.words == pytest.approx(6, abs=0.1)
    packed = tmp_path / "wiki.jsonl.gz"
    packed.write_bytes(gzip.compress(texts.read_bytes()))
    assert 100 <= forecast(BuildConfig(input=str(packed), output="o")).passages < 2 * ROWS
    assert (found.dim, found.encoded_per_s) == (0, 0.0)


def test_figures_of_wiki_18_without_vectors(monkeypatch, texts):
    """21,015,324 passages of 100 words, as `sd-search data plan` has them: text 13.9 GB, postings 15.6 GB."""
    monkeypatch.setattr(parts, "SAMPLED_ROWS", 1)
    monkeypatch.setattr(parts, "_text_bytes", lambda path: 21_015_324 * size)
    text = json.dumps({"id": "0", "title": "T", "text": " ".join(["word"] * 99)})
    size = len(text.encode())
    texts.write_text(f"{text}\n{text}\n")
    found = forecast(BuildConfig(input=str(texts), output="o"))
    assert found.passages == pytest.approx(21_015_324) and found.words == 100
    assert found.ram_gb == pytest.approx(29.4, abs=0.1)
    assert found.disk_gb == pytest.approx(2 * 6.5 + 29.4, abs=0.1)


def test_a_disk_without_the_room_is_told_before_anything_is_written(texts, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda path: usage(1, 1, 10))
    with pytest.raises(ConfigError, match=r"output: found 0.0 GB free below .*, expected about"):
        build(BuildConfig(input=str(texts), output=str(tmp_path / "out")), print)
    assert not (tmp_path / "out").exists()


def test_input_without_passages_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match=r"input: found no passage in .*empty.jsonl"):
        forecast(BuildConfig(input=str(tmp_path / "empty.jsonl"), output="o"))


def test_the_command_serves_what_it_built(texts, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(retriever, "main", told.append)
    output = tmp_path / "out"
    data.build([f"--input={texts}", f"--output={output}"])
    assert capsys.readouterr().out.endswith(
        f"corpus {output}/corpus; `sd-search retriever serve --corpus {output}/corpus` serves it\n"
    )
    data.build([f"--input={texts}", f"--output={output}", "--serve=true", "--port=0"])
    assert told == [[f"--corpus={output}/corpus", "--port=0"]]
