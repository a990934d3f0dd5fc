"""CSV, TSV and JSON files as they come: unquoted, quoted, both, without header, with a byte order mark,
under other names."""

import bz2
import json
import lzma
import subprocess
import sys

import pytest

from data_prep.sources import separated
from data_prep.sources.jsonl import RowError
from data_prep.sources.rows import read_rows
from megatron_sd.errors import DataError


def _rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(read_rows(path))
    for num_done in range(len(found) + 1):
        assert list(map(str, read_rows(path, num_done))) == list(map(str, found[num_done:]))
    return [
        (line.number, "reject" if isinstance(row, RowError) else list(row.values())) for line, row in found
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            '2\t"Halloween is a film\n3\tplain\n4\tplain "\n',
            [(2, ["2", '"Halloween is a film']), (3, ["3", "plain"]), (4, ["4", 'plain "'])],
        ),
        ('2\t"Foo" is a word\n3\tx\n', [(2, ["2", '"Foo" is a word']), (3, ["3", "x"])]),
        (
            '1\t"He said ""hi"""\n2\t"one\nline two"\n3\tx\n',
            [(2, ["1", 'He said "hi"']), (3, ["2", "one\nline two"]), (5, ["3", "x"])],
        ),
        ('1\t"a\tb"\n2\ta\tb\n3\tx', [(2, ["1", "a\tb"]), (3, "reject"), (4, ["3", "x"])]),
        ('1\n2\t"open\n3\t"open too"\n', [(2, "reject"), (3, ["2", '"open']), (4, ["3", "open too"])]),
        ("1\tx\r\n\r\n2\ty\r\n", [(2, ["1", "x"]), (4, ["2", "y"])]),
    ],
)
def test_a_tsv_row_is_never_swallowed_by_a_quote(tmp_path, body, expected):
    assert _rows(tmp_path, "p.tsv", "id\ttext\n" + body) == expected


def test_a_quote_in_a_column_that_is_not_the_last(tmp_path):
    body = 'id\ttext\ttitle\n1\the said "hi"\tA\n2\t"Halloween\tB\n3\t"one\ntwo"\tC\n4\t"\tD\n'
    expected = [
        (2, ["1", 'he said "hi"', "A"]),
        (3, ["2", '"Halloween', "B"]),
        (4, ["3", "one\ntwo", "C"]),
        (6, ["4", '"', "D"]),
    ]
    assert _rows(tmp_path, "p.tsv", body) == expected


def test_a_csv_row_that_is_broken_is_one_reject_on_its_own_line(tmp_path):
    body = 'id,text\n1,"a, ""b""\nc"\n2,"x" y\n3,z\n'
    assert _rows(tmp_path, "p.csv", body) == [(2, ["1", 'a, "b"\nc']), (4, "reject"), (5, ["3", "z"])]


def test_one_field_beyond_the_bound_is_one_reject(tmp_path, monkeypatch):
    monkeypatch.setattr(separated, "MAX_RECORD_BYTES", 100)
    assert _rows(tmp_path, "p.tsv", "id\ttext\n1\t" + "x " * 80 + "\n2\tok\n") == [
        (2, "reject"),
        (3, ["2", "ok"]),
    ]


def test_a_file_without_header_says_so(tmp_path):
    with pytest.raises(DataError, match=r"p\.tsv:1: there is no header line: found a row, \['0', 'The first"):
        _rows(tmp_path, "p.tsv", "0\tThe first passage.\n1\tThe second.\n")


def test_dpr_questions_have_no_header_and_tabs_in_a_csv(tmp_path):
    body = "who got it\t['W. C.']\nwhat is \"it\"?\t[\"O'Hara\", 'x']\n"
    expected = [(1, ["who got it", "['W. C.']"]), (2, ['what is "it"?', "[\"O'Hara\", 'x']"])]
    assert _rows(tmp_path, "nq-test.qa.csv", body) == expected


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv", "lines.json", "wiki_00"])
def test_a_byte_order_mark_and_names_that_say_little(tmp_path, name):
    rows = [{"id": "1", "text": "x"}, {"id": "2", "text": "y"}]
    lines = "\n".join(map(json.dumps, rows))
    table = "id,text\n1,x\n2,y\n"
    content = {"p.json": json.dumps(rows), "p.csv": table, "p.tsv": table.replace(",", "\t")}.get(name, lines)
    for mark in ("", "\ufeff"):
        assert [values for _, values in _rows(tmp_path, name, mark + content)] == [["1", "x"], ["2", "y"]]
    for suffix, module in ((".bz2", bz2), (".xz", lzma)):
        packed = name + suffix if "." in name else name + ".jsonl" + suffix
        assert len(_rows(tmp_path, packed, module.compress(content.encode()))) == 2


def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    rows = [{"id": str(number), "text": 'é "[{,' * number} for number in range(20)]
    for size in (1, 7, 64):
        monkeypatch.setattr("data_prep.sources.jsonl._BLOCK_BYTES", size)
        found = _rows(tmp_path, "p.json", json.dumps(rows, ensure_ascii=False, indent=size % 2) + " \n")
        assert [values for _, values in found] == [list(row.values()) for row in rows]
    for broken in ('[{"id": 1}', '[{"id": 1} {"id": 2}]', '[{"id": 1}] x', '[{"id": 1},]', "[{"):
        with pytest.raises(DataError, match="p.json is no JSON"):
            _rows(tmp_path, "p.json", broken)


def test_a_folder_of_shards(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"id": "{2 * number}"}}\n{{"id": "{2 * number + 1}"}}\n')
    every = list(read_rows(tmp_path))
    assert [(line.place, row["id"]) for line, row in every] == [
        ("0.jsonl:1", "0"),
        ("0.jsonl:2", "1"),
        ("1.jsonl:1", "2"),
        ("1.jsonl:2", "3"),
    ]
    assert [list(read_rows(tmp_path, done)) for done in range(5)] == [every[done:] for done in range(5)]
    (tmp_path / "x.csv").write_text("id\n1\n")
    with pytest.raises(DataError, match=r"found \.csv and \.jsonl, expected a folder"):
        list(read_rows(tmp_path))


def test_an_import_loads_no_framework():
    code = (
        "import sys, data_prep.sources.questions; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
