"""Importing and loading questions and passages: every format, every way a row can be broken, compressed and
damaged files."""

import gzip
import json

import pytest
import zstandard

from data_prep.passages.corpus import parse_passage
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import PassageTable
from data_prep.sources.jsonl import RowError, read_lines
from data_prep.sources.questions import ImportConfig, ImportReport, import_file, parse_question
from data_prep.sources.rows import parse_rows
from megatron_sd.errors import DataError
from megatron_sd.records import Passage, Question
from megatron_sd.search.questions import load_questions

OWN = {
    "id": "w1",
    "text": "Who guides Kalo?",
    "golden_answers": ["Dava Sul"],
    "source": "world",
    "split": "train",
    "supporting": [["p17"], ["p90", "p91"]],
}
TITLED = {
    "id": "hotpotqa/5ab6",
    "dataset": "hotpotqa",
    "split": "eval",
    "question": "Which college?",
    "golden_answers": ["Berea College", "Berea"],
    "type": "bridge",
    "supporting": [
        {"title": "Berea College", "ids": ["28314", "7"]},
        {"title": "James Fieser", "ids": [29615]},
    ],
}
SEARCH_R1 = {"id": 3, "data_source": "nq", "question": "when?", "golden_answers": "1972"}


def _write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _import(tmp_path, *lines, **options):
    source = _write(tmp_path / "in.jsonl", *lines)
    config = {"kind": "questions", "input": str(source), "output": str(tmp_path / "out.jsonl")} | options
    return import_file(ImportConfig(**config))


def _rejects(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]


def test_every_question_format():
    assert parse_question(OWN) == Question(
        id="w1",
        text="Who guides Kalo?",
        golden_answers=("Dava Sul",),
        source="world",
        split="train",
        supporting=(("p17",), ("p90", "p91")),
    )
    titled = parse_question(TITLED)
    assert (titled.source, titled.supporting) == ("hotpotqa", (("28314", "7"), ("29615",)))
    assert parse_question(SEARCH_R1) == Question(id="3", text="when?", golden_answers=("1972",), source="nq")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": None}, "'id' is None"),
        ({"id": True}, "'id' is True"),
        ({"text": " "}, "'text' is ' '"),
        ({"text": 5}, "'text' is 5"),
        ({"golden_answers": []}, "'golden_answers' is []"),
        ({"golden_answers": ["a", 3]}, "expected a non-empty list of strings"),
        ({"supporting": "p1"}, "'supporting' holds 'p1'"),
        ({"supporting": [[]]}, "a hop of 'supporting' is []"),
        ({"supporting": [{"title": "x"}]}, "'supporting' holds None"),
        ({"split": 1}, "'split' is 1"),
    ],
)
def test_broken_question_rows_say_what_is_wrong(changes, message):
    with pytest.raises(RowError) as error:
        parse_question(OWN | changes)
    assert message in str(error.value)


def test_every_passage_format():
    assert parse_passage({"id": "1", "title": "T", "text": "x", "datasets": []}) == Passage(
        id="1", title="T", text="x"
    )
    assert parse_passage({"id": 1, "text": "x"}) == Passage(id="1", title="", text="x")
    assert parse_passage({"id": "1", "contents": '"Ed "Wood" (film)"\nEd Wood is\na film'}) == Passage(
        id="1", title='Ed "Wood" (film)', text="Ed Wood is\na film"
    )
    assert parse_passage({"id": "1", "contents": "Bare title\ntext"}).title == "Bare title"


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1"},
        {"id": "1", "text": ""},
        {"id": "1", "contents": " "},
        {"id": 1.5, "text": "x"},
        {"text": "x"},
    ],
)
def test_broken_passage_rows(row):
    with pytest.raises(RowError):
        parse_passage(row)


SURROGATE = b'{"id": "w2", "text": "\\ud800", "golden_answers": ["ab"]}'
DEEP = b'{"id":' + b"[" * 200_000


@pytest.mark.parametrize(
    "line", [b"[1]", b"null", b"5", b'"x"', b"\x00", b"{", b'{"id": "\xff", "text": "x"}', SURROGATE, DEEP]
)
def test_rows_that_are_no_objects_are_rejected_not_guessed(tmp_path, line):
    (tmp_path / "q.jsonl").write_bytes(
        json.dumps(OWN).encode() + b"\n\n" + line + b"\n" + json.dumps(OWN).encode()
    )
    found = list(parse_rows(tmp_path / "q.jsonl", lambda row, line: parse_question(row)))
    assert [(line.number, isinstance(result, RowError)) for line, result in found] == [
        (1, False),
        (3, True),
        (4, True),
    ]
    assert found[0][1].id == "w1"
    assert str(found[2][1]) == "id 'w1' repeats that of q.jsonl:1"


def test_import_keeps_count_of_every_row(tmp_path):
    good = [OWN | {"id": f"w{i}"} for i in range(3)]
    two = OWN | {"id": "w8", "golden_answers": ["$", "US dollar"]}
    report = _import(
        tmp_path, *good, "{", two, OWN | {"id": "w9", "golden_answers": ["The"]}, max_reject_share=0.4
    )
    assert report == ImportReport(
        num_kept=4, num_rejected=2, num_notes=1, rejects=str(tmp_path / "out.rejects.jsonl")
    )
    assert [(r["file"], r["line"]) for r in _rejects(tmp_path)] == [
        ("in.jsonl", 4),
        ("in.jsonl", 5),
        ("in.jsonl", 6),
    ]
    assert _rejects(tmp_path)[0]["content"] == "{"
    assert "['The'] normalise to nothing" in _rejects(tmp_path)[2]["reason"]
    loaded = load_questions(tmp_path / "out.jsonl")
    assert [q.id for q in loaded] == ["w0", "w1", "w2", "w8"]
    assert loaded[3].golden_answers == ("US dollar",)
    assert loaded[0] == parse_question(good[0])


def test_import_fills_missing_labels_only(tmp_path):
    _import(
        tmp_path, TITLED, {"id": "x", "question": "q", "golden_answers": ["ab"]}, source="nq", split="test"
    )
    first, second = load_questions(tmp_path / "out.jsonl")
    assert (first.source, first.split) == ("hotpotqa", "eval")
    assert (second.source, second.split) == ("nq", "test")


def test_hops_are_found_by_title(tmp_path):
    titles = ["James Fieser", "Berea College", "James Fieser"]
    passages = [{"id": i, "contents": f'"{title}"\ntext'} for i, title in enumerate(titles)]
    path = _write(tmp_path / "p.jsonl", *passages)
    _import(tmp_path, TITLED, passages=str(path))
    assert load_questions(tmp_path / "out.jsonl")[0].supporting == (("1",), ("0", "2"))
    unknown = TITLED | {"supporting": [{"title": "Nowhere", "ids": ["1"]}]}
    report = _import(tmp_path, unknown, passages=str(path))
    assert (report.num_kept, report.noted) == (1, {"with an unknown hop": 1})
    assert json.loads((tmp_path / "out.jsonl").read_text())["unknown_hops"] == ["Nowhere"]


def test_too_many_rejects_are_an_error_and_are_written_down(tmp_path):
    with pytest.raises(
        DataError,
        match=r"2 of 3 rows are broken, more than the allowed share of 0\.01; the first: in\.jsonl:1",
    ):
        _import(tmp_path, "{", "{", OWN)
    assert len(_rejects(tmp_path)) == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_a_clean_import_removes_old_rejects(tmp_path):
    _import(tmp_path, "{", OWN, max_reject_share=1.0)
    assert _import(tmp_path, OWN).rejects is None
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_import_passages(tmp_path):
    rows = [{"id": "2", "title": "U\nV", "text": "y", "license": "MIT"}, {"id": "1", "contents": '"T"\nx'}]
    options = {"kind": "passages", "output": str(tmp_path / "out"), "source": "s", "license": "CC0-1.0"}
    assert _import(tmp_path, *rows, **options).num_kept == 2
    table = PassageTable(tmp_path / "out")
    assert list(table) == [
        SourcedPassage(id="1", title="T", text="x", source="s", license="CC0-1.0"),
        SourcedPassage(id="2", title="U V", text="y", source="s", license="MIT"),
    ]
    assert (table.manifest.sources, table.manifest.licenses) == (("s",), ("CC0-1.0", "MIT"))
    with pytest.raises(DataError, match="out exists"):
        _import(tmp_path, *rows, **options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "1", "text": " "}, "field 'text' is ' '"),
        ({"id": "1", "text": "a\0b"}, "field 'text' holds a NUL character"),
        ({"id": "1", "text": "é" * 500_001}, "field 'text' has 1000002 bytes, expected at most 1000000"),
        ({"id": "1", "title": 5, "text": "a"}, "field 'title' is 5"),
        ({"id": "1", "text": "a", "license": 5}, "field 'license' is 5"),
        ({"id": "ok", "text": "a"}, "id 'ok' repeats that of in.jsonl:1"),
    ],
)
def test_a_bad_passage_is_rejected_and_too_many_leave_nothing(tmp_path, row, reason):
    options = {"kind": "passages", "output": str(tmp_path / "out")}
    good = {"id": "ok", "text": "b"}
    with pytest.raises(DataError, match="1 of 2 rows are broken"):
        _import(tmp_path, good, row, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.rejects.jsonl"]
    assert _import(tmp_path, good, row, max_reject_share=0.5, **options).num_kept == 1
    (reject,) = _rejects(tmp_path)
    assert (reject["line"], reason in reject["reason"]) == (2, True), reject["reason"]


def test_invalid_utf8_is_rejected_by_line(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "1", "text": "a"}\n{"id": "2", "text": "\xff"}\n')
    config = {
        "kind": "passages",
        "input": str(tmp_path / "p.jsonl"),
        "output": str(tmp_path / "out"),
        "max_reject_share": 0.5,
    }
    assert import_file(ImportConfig(**config)).num_rejected == 1
    assert _rejects(tmp_path)[0]["line"] == 2


def test_compressed_files_read_alike(tmp_path):
    # spans several read blocks
    rows = [json.dumps(OWN | {"id": f"w{i}", "text": "é" * 2000}) for i in range(900)]
    content = "\n".join(rows).encode()
    (tmp_path / "q.jsonl").write_bytes(content)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "q.jsonl.zst").write_bytes(zstandard.compress(content))
    plain = list(read_lines(tmp_path / "q.jsonl"))
    assert [number for number, _ in plain] == list(range(1, 901))
    assert list(read_lines(tmp_path / "q.jsonl.gz")) == plain
    assert list(read_lines(tmp_path / "q.jsonl.zst")) == plain
    half = len(content) // 2
    (tmp_path / "q.jsonl.zst").write_bytes(
        zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    )
    assert list(read_lines(tmp_path / "q.jsonl.zst")) == plain


def test_damaged_files_are_named(tmp_path):
    content = "\n".join(json.dumps(OWN | {"id": f"w{i}"}) for i in range(50)).encode()
    for name, compressed in [
        ("q.jsonl.gz", gzip.compress(content)),
        ("q.jsonl.zst", zstandard.compress(content)),
    ]:
        for broken in (compressed[:-9], compressed[: len(compressed) // 2], b"not compressed"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                list(read_lines(tmp_path / name))
    with pytest.raises(DataError, match="cannot read"):
        list(read_lines(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="cannot read"):
        list(read_lines(tmp_path))


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        _import(tmp_path)
