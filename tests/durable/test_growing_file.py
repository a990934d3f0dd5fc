"""Lines of a file that grows, is cut, and is exchanged."""

import os

from megatron_sd.durable.growing_file import GrowingFile


def append(path, content):
    with path.open("ab") as file:
        file.write(content)


def test_only_new_lines_are_read_and_half_a_line_waits(tmp_path):
    path = tmp_path / "file"
    growing = GrowingFile(path)
    assert growing.take().lines == [] and growing.offset == 0
    append(path, b"one\ntw")
    assert growing.take().lines == [b"one"] and growing.offset == 4
    with path.open("r+b") as file:  # what was read is not looked at again
        file.write(b"ONE\n")
    append(path, b"o\nthree\n")
    assert growing.take().lines == [b"two", b"three"] and growing.offset == 14
    assert growing.take().lines == [] and growing.offset == 14


def test_half_a_line_that_was_cut_leaves_no_trace(tmp_path):
    path = tmp_path / "file"
    growing = GrowingFile(path)
    append(path, b"one\nha")
    assert growing.take().lines == [b"one"]
    os.truncate(path, 4)
    append(path, b"two\n")
    taken = growing.take()
    assert taken.lines == [b"two"] and not taken.anew


def test_a_file_that_was_cut_or_exchanged_is_read_anew(tmp_path):
    path = tmp_path / "file"
    growing = GrowingFile(path)
    append(path, b"one\ntwo\nth")
    growing.take()
    path.write_bytes(b"uno\n")
    taken = growing.take()
    assert taken.anew and taken.lines == [b"uno"]
    (tmp_path / "other").write_bytes(b"eins\nzwei\n")
    os.replace(tmp_path / "other", path)
    taken = growing.take()
    assert taken.anew and taken.lines == [b"eins", b"zwei"]
