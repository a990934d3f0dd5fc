"""An import's memory is that of the rows it sorts at a time, not of the file; and repeated ids are still
known."""

import gc
import json
import random

import pyarrow.parquet as pq
import pytest

from data_prep.passages import corpus, runs, table
from data_prep.passages.sourced import SourcedPassage
from data_prep.sources.met_ids import IdsInMemory, IdsOnDisk
from data_prep.sources.questions import ImportConfig, import_file


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_repeated_id_is_answered_with_the_place_of_the_first(tmp_path, on_disk):
    known = [("10", "f:1"), ("é", "f:2"), ("", "f:3")]
    met = IdsOnDisk(tmp_path / "ids", known) if on_disk else IdsInMemory()
    for id_, place in [] if on_disk else known:
        assert met.meet(id_, place) is None
    assert [met.meet(id_, f"g:{n}") for n, id_ in enumerate(["10", "1", "E\u0301", "é", "1", "010", ""])] == [
        "f:1", None, None, "f:2", "g:1", None, "f:3",
    ]  # fmt: skip
    if on_disk:
        met.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_killed_import_left_is_not_believed(tmp_path):
    IdsOnDisk(tmp_path / "ids", [("a", "f:1")])  # never closed
    (tmp_path / "other").write_bytes(b"no database")
    for name in ("ids", "other"):
        met = IdsOnDisk(tmp_path / name, [("b", "f:2")])
        assert (met.meet("a", "g:1"), met.meet("b", "g:2")) == (None, "f:2")
        met.close()


def _num_alive(kind):
    return sum(type(own) is kind for own in gc.get_objects())


@pytest.mark.slow
def test_no_more_rows_are_in_memory_than_are_sorted_at_a_time(tmp_path, monkeypatch):
    """benchmarks/retrieval/import_memory.py measures bytes; here rows are counted, wherever there may be
    most of them."""
    monkeypatch.setattr(runs, "_READ_ROWS", 2)
    monkeypatch.setattr(table, "ROWS_PER_BATCH", 25)
    alive = {"sorting": 0, "merging": 0}
    ids = list(range(400))
    random.Random(0).shuffle(ids)
    path = tmp_path / "in.jsonl"
    rows = [json.dumps({"id": f"{id_}", "title": "t", "text": f"kalo {id_}"}) for id_ in [*ids, ids[0]]]
    path.write_text("".join(f"{row}\n" for row in rows))
    parse, write_batch = corpus.parse_sourced, pq.ParquetWriter.write_batch

    def parsing(row, line, **options):
        if line.number % 20 == 19:
            alive["sorting"] = max(alive["sorting"], _num_alive(SourcedPassage))
            assert (tmp_path / "out.partial/runs/ids.sqlite").exists()
        return parse(row, line, **options)

    def writing(writer, batch):
        alive["merging"] = max(alive["merging"], _num_alive(SourcedPassage))
        write_batch(writer, batch)

    monkeypatch.setattr(corpus, "parse_sourced", parsing)
    monkeypatch.setattr(pq.ParquetWriter, "write_batch", writing)
    report = import_file(
        ImportConfig(kind="passages", input=str(path), output=str(tmp_path / "out"), rows_per_run=40)
    )
    assert (report.num_kept, report.num_rejected) == (400, 1)
    reject = json.loads((tmp_path / "out.rejects.jsonl").read_text())
    assert (reject["line"], reject["reason"]) == (401, f"id '{ids[0]}' repeats that of in.jsonl:1")
    assert [passage.id for passage in table.PassageTable(tmp_path / "out")] == sorted(map(str, ids))
    assert 0 < alive["sorting"] <= 40  # one run
    assert 0 < alive["merging"] <= 25 + 11  # a row group, and the next row of each of the 11 runs
