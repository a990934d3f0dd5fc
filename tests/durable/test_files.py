"""Files that are whole or not there."""

import errno
import json
import os

import pytest

from megatron_sd.durable import files
from megatron_sd.durable.files import append_lines, cut_torn_line, whole_file, write_whole


def test_a_file_keeps_what_it_had_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "report.json"
    write_whole(path, "old")
    with pytest.raises(OSError), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["report.json"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda paths: order.append("flush") or flush(paths))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("name") or replace(a, b))
    write_whole(tmp_path / "a", b"\x00\xff")
    assert order == ["flush", "name"] and (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "shard.npy"
    with whole_file(path, writer="1") as one, whole_file(path, writer="2") as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"


def test_text_that_no_utf_8_can_hold_is_written_with_a_question_mark(tmp_path):
    write_whole(tmp_path / "a", "é \ud800")
    assert (tmp_path / "a").read_bytes() == "é ?".encode()


def test_lines_are_appended_and_half_a_line_is_cut(tmp_path):
    path = tmp_path / "samples.jsonl"
    cut_torn_line(path)  # nothing is there
    append_lines(path, [{"n": 1}, {"n": "é\ud800"}])
    path.write_bytes(path.read_bytes() + b'{"n": 3')
    cut_torn_line(path)
    append_lines(path, [{"n": 4}])
    found = [json.loads(line)["n"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert found == [1, "é?", 4]
