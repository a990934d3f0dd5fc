"""Import, chunk and index, killed with SIGKILL before every rename and removal, and at random: the next
start goes on."""

import errno
import fcntl
import json
import os
import random
import shutil
import time

import pytest
import zstandard

from data_prep.passages import runs as runs_module
from data_prep.passages.chunk import ChunkConfig, chunk_passages
from data_prep.passages.index import IndexConfig, build_index
from data_prep.passages.sourced import SourcedPassage
from data_prep.passages.table import Origin, PassageTable, write_table
from data_prep.sources.questions import ImportConfig, import_file
from megatron_sd.durable.resumable import PLAN_NAME
from megatron_sd.errors import ConfigError, DataError
from tests.data_prep.killed_stages import Start, contents, launch, run, small_pieces

ROWS_PER_RUN = 16
NUM_KILLS = 3  # of one import, at random moments; tests/retrieval/faults.py kills each stage 50 times
STRIDE = 1 if os.environ.get("SD_SEARCH_FULL") else 4  # of the changes before which a stage is killed
STAGES = ("import", "chunk")


def _lines():
    """100 rows in no order, 5 of them broken: in the first run and in the last, and ids that repeat those
    of other runs."""
    good = [
        json.dumps(
            {
                "id": f"{n}",
                "title": f"t{n}",
                "text": f"kalo é{n} dava sul " * (n % 9 + 1),
                "source": f"s{n // 40}",
            }
        )
        for n in range(95)
    ]
    random.Random(0).shuffle(good)
    nul = '{"id": "z", "text": "a\\u0000b"}'
    return [
        *good[:3],
        "{",
        *good[3:50],
        "",
        good[0],
        *good[50:80],
        good[60],
        *good[80:],
        nul,
        '{"id": "0", "text": "again"}',
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Input of every stage."""
    folder = tmp_path_factory.mktemp("input")
    (folder / "wiki.jsonl.zst").write_bytes(zstandard.compress("\n".join(_lines()).encode()))
    rows = [
        SourcedPassage(id=f"{n:03d}", title=f"t{n}", text=f"kalo é{n} dava " * (1 + n % 9), license="MIT")
        for n in range(60)
    ]
    with small_pieces():
        write_table(folder / "passages", rows, Origin())
    return folder


def _config(stage, folder, output, **changes):
    if stage == "import":
        options = {
            "kind": "passages",
            "input": f"{folder}/wiki.jsonl.zst",
            "license": "MIT",
            "max_reject_share": 0.2,
        }
        return ImportConfig(**(options | {"output": str(output), "rows_per_run": ROWS_PER_RUN} | changes))
    paths = {"passages": f"{folder}/passages", "output": str(output)}
    if stage == "chunk":
        return ChunkConfig(**(paths | {"size": 10, "stride": 7, "rows_per_run": ROWS_PER_RUN} | changes))
    return IndexConfig(**(paths | changes))


def _start(stage, folder, output, **changes):
    output.parent.mkdir(exist_ok=True)
    kill_before = changes.pop("kill_before", None)
    log = output.parent.with_suffix(".log")
    return Start(
        stage=stage, config=_config(stage, folder, output, **changes), log=log, kill_before=kill_before
    )


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """By stage: everything a start leaves that nobody kills, how many rows it reads, how many changes it
    makes."""
    found = {}
    for stage in (*STAGES, "index"):
        output = tmp_path_factory.mktemp(stage) / "out/made"
        code, num_read, num_changes = run(_start(stage, folder, output))
        assert code == 0
        found[stage] = contents(output.parent), num_read, num_changes
    return found


def _num_finished(partial):
    """Rows of the source that finished runs hold; all when the manifest is written."""
    if not (partial / PLAN_NAME).exists():
        return 0
    records = sorted((partial / "runs").glob("*.json"))
    return json.loads(records[-1].read_text())["num_read"] if records else 0


def test_what_is_made_without_a_kill(undisturbed):
    files, num_read, _ = undisturbed["import"]
    assert sorted(files) == [
        "made.rejects.jsonl",
        "made/manifest.json",
        *(f"made/passages-{n:05d}.parquet" for n in range(3)),
    ]
    rejects = [json.loads(line) for line in files["made.rejects.jsonl"].splitlines()]
    assert [reject["line"] for reject in rejects] == [4, 53, 84, 100, 101]
    assert rejects[1]["reason"].endswith("repeats that of wiki.jsonl.zst:1")
    assert rejects[2]["reason"].endswith("repeats that of wiki.jsonl.zst:64")
    assert num_read == 100
    files, num_read, _ = undisturbed["chunk"]
    assert json.loads(files["made/manifest.json"])["num_passages"] == 130
    assert num_read == 60


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_each_change_it_makes_on_disk(stage, folder, undisturbed, tmp_path):
    """Before every rename that makes a piece finished, and every removal: nothing finished is done again."""
    files, num_rows, num_changes = undisturbed[stage]
    seen = set()
    for number in range(1, num_changes + 1, STRIDE):
        output = tmp_path / f"{number}/made"
        assert run(_start(stage, folder, output, kill_before=number))[0] == -9
        partial = output.with_name("made.partial")
        if output.exists():  # killed after the last rename
            assert {f"made/{name}": own for name, own in contents(output).items()}.items() <= files.items()
            continue
        is_sealed = (partial / "manifest.json").exists() and (partial / PLAN_NAME).exists()
        expected = 0 if is_sealed else num_rows - _num_finished(partial)
        seen.add(expected)
        code, num_read, _ = run(_start(stage, folder, output))
        assert (code, num_read) == (0, expected), f"change {number}"
        assert contents(output.parent) == files, f"change {number}"
        shutil.rmtree(output.parent)
    assert {0, num_rows} < seen and len(seen) > 3


@pytest.mark.slow
@pytest.mark.ranks
def test_an_index_goes_on_after_its_finished_parts(folder, undisturbed, tmp_path):
    files, _, num_changes = undisturbed["index"]
    for number in range(1, num_changes + 1):
        output = tmp_path / f"{number}/made"
        assert run(_start("index", folder, output, kill_before=number))[0] == -9
        partial = output.with_name("made.partial")
        kept = {
            path: path.stat().st_mtime_ns
            for name in ("passages.arrow", "bm25")
            for path in partial.glob(name)
        }
        if not output.exists():
            is_begun = (partial / PLAN_NAME).exists()
            _call(_config("index", folder, output))
            assert all(
                (output / path.name).stat().st_mtime_ns == then for path, then in kept.items() if is_begun
            )
        assert {
            name: own for name, own in contents(output.parent).items() if not name.endswith(".lock")
        } == files


@pytest.mark.ranks
def test_killed_at_random_again_and_again(folder, undisturbed, tmp_path):
    """Each start but the last is killed after a random time; none may read again what an earlier one
    finished."""
    files, num_rows, _ = undisturbed["import"]
    rng, output = random.Random(1), tmp_path / "random/made"
    partial = output.with_name("made.partial")
    start = _start("import", folder, output)
    began = time.monotonic()
    run(_start("import", folder, tmp_path / "timed/made"))
    whole_s = time.monotonic() - began
    num_killed = 0
    while num_killed < NUM_KILLS:
        finished = _num_finished(partial)
        start.log.write_bytes(b"")
        process = launch(start)
        time.sleep(rng.random() * whole_s)
        process.kill()
        process.join()
        num_killed += process.exitcode == -9
        if output.exists():
            assert {
                name: own for name, own in contents(output.parent).items() if not name.endswith(".lock")
            } == files
            shutil.rmtree(output.parent)
            output.parent.mkdir()
        else:
            num_read = len(start.log.read_bytes().partition(b"\n")[0])
            assert num_read <= num_rows - finished
    assert output.exists() or run(start)[0] == 0
    assert contents(output.parent) == files


def _interrupted(stage, folder, tmp_path, number=9):
    """A directory that was left in the middle."""
    output = tmp_path / "out/made"
    assert run(_start(stage, folder, output, kill_before=number))[0] == -9
    assert _num_finished(output.with_name("made.partial")) > 0
    return output


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("import", {"license": "CC0-1.0"}, r"import\.license was 'MIT' and is 'CC0-1\.0'; use what"),
        ("import", {"max_text_bytes": 9}, r"import\.max_text_bytes was 1000000 and is 9"),
        ("chunk", {"size": 11, "stride": 5}, r"chunks\.size was 10 and is 11, chunks\.stride was 7 and is 5"),
        ("chunk", {"unit": "sentences"}, r"chunks\.unit was 'words' and is 'sentences'"),
    ],
)
def test_other_arguments_are_not_mixed_in(stage, changes, message, folder, undisturbed, tmp_path):
    output = _interrupted(stage, folder, tmp_path)
    before = contents(output.with_name("made.partial"))
    with pytest.raises(DataError, match=message):
        _call(_config(stage, folder, output, **changes))
    assert contents(output.with_name("made.partial")) == before
    # how much is sorted at a time may change
    assert run(_start(stage, folder, output, rows_per_run=40))[0] == 0
    assert contents(output.parent) == undisturbed[stage][0]


def _call(config):
    function = {ImportConfig: import_file, ChunkConfig: chunk_passages, IndexConfig: build_index}[
        type(config)
    ]
    with small_pieces():
        return function(config)


def test_another_input_is_not_mixed_in(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    output = _interrupted("import", copy, tmp_path)
    content = "\n".join(_lines()).replace("kalo", "kali").encode()
    (copy / "wiki.jsonl.zst").write_bytes(zstandard.compress(content))
    with pytest.raises(DataError, match=r"input\.wiki\.jsonl\.zst\.xxh3_128 was '\w+' and is '\w+'"):
        _call(_config("import", copy, output))
    os.rename(copy / "wiki.jsonl.zst", copy / "other.jsonl.zst")
    with pytest.raises(DataError, match=r"input\.other\.jsonl\.zst\.num_bytes was None"):
        _call(_config("import", copy, output, input=f"{copy}/other.jsonl.zst"))
    shutil.rmtree(output.with_name("made.partial"))  # as the message says
    assert _call(_config("import", copy, output, input=f"{copy}/other.jsonl.zst")).num_kept == 95


def test_before_anything_is_finished_other_arguments_start_anew(folder, tmp_path):
    output = tmp_path / "out/made"
    assert run(_start("import", folder, output, kill_before=2))[0] == -9
    assert (output.with_name("made.partial") / PLAN_NAME).exists()
    assert _call(_config("import", folder, output, license="CC0-1.0")).num_kept == 95
    assert PassageTable(output).manifest.licenses == ("CC0-1.0",)


@pytest.mark.parametrize("damage", ["flip", "missing", "record"])
def test_a_damaged_run_is_named_and_nothing_stays(damage, folder, tmp_path):
    output = _interrupted("import", folder, tmp_path)
    run_file = output.with_name("made.partial") / "runs/00001.arrow"
    if damage == "flip":
        content = bytearray(run_file.read_bytes())
        content[len(content) // 2] ^= 1
        run_file.write_bytes(content)
    elif damage == "missing":
        run_file.unlink()
    else:
        run_file.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match=r"runs/00001\.\w+ is .*what was finished is removed; start again"):
        _call(_config("import", folder, output))
    assert list(output.parent.iterdir()) == []
    assert _call(_config("import", folder, output)).num_kept == 95


def test_a_full_disk_costs_one_run(folder, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "out/made"
    output.parent.mkdir()
    whole_file = runs_module.whole_file

    def full(path):
        if path.name == "00002.arrow":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_file(path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(runs_module, "whole_file", full)
        _call(_config("import", folder, output))
    code, num_read, _ = run(_start("import", folder, output))
    assert (code, num_read) == (0, 100 - 2 * ROWS_PER_RUN)
    assert contents(output.parent) == undisturbed["import"][0]


def test_two_programs_do_not_write_one_directory(folder, tmp_path):
    output = tmp_path / "made"
    with open(tmp_path / "made.partial.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"made\.partial is being written by another process"):
            _call(_config("import", folder, output))
    assert _call(_config("import", folder, output)).num_kept == 95  # a killed program's lock holds nobody up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made.rejects.jsonl"]
    with pytest.raises(ConfigError, match="rows_per_run: found 0, expected at least 1"):
        _call(_config("import", folder, tmp_path / "x", rows_per_run=0))


def test_a_repeated_id_beside_the_last_one_written_is_found_after_a_kill(tmp_path):
    """Chunks may meet the id of another passage: at the border of a shard, whose first copy is already
    written."""
    rows = [SourcedPassage(id=f"{n:03d}", title="t", text="kalo") for n in range(31)]
    rows += [
        SourcedPassage(id="031", title="t", text="a b c"),
        SourcedPassage(id="031#0000", title="t", text="a"),
    ]
    with small_pieces():
        write_table(tmp_path / "passages", rows, Origin())
    output = tmp_path / "out/made"
    changes = {"size": 2, "stride": 2, "rows_per_run": 64}
    num_shards = []
    for number in range(1, 6):
        assert run(_start("chunk", tmp_path, output, kill_before=number, **changes))[0] == -9
        num_shards.append(len(list(output.with_name("made.partial").glob("passages-*.parquet"))))
        with pytest.raises(DataError, match="found '031#0000' twice"):
            _call(_config("chunk", tmp_path, output, **changes))
        assert not output.exists() and not output.with_name("made.partial").exists()
    assert num_shards == [0, 0, 0, 0, 1]
