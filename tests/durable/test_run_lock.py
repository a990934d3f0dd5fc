"""Two runs in one directory: the second is refused by name, a killed holder's lock is not in the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.local import main as train_here
from megatron_sd.durable import run_lock
from megatron_sd.durable.run_lock import LOCK_NAME, Holder, hold, read_holder, refuse_held
from megatron_sd.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from megatron_sd.durable.run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holding(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(**changes) -> Holder:
    """A holder on another machine."""
    fields = {
        "token": "theirs",
        "host": "node7",
        "machine": "another",
        "pid": 1,
        "born": 1,
        "since": "2026-01-02 03:04:05",
    }
    return Holder(**fields | changes)


def put(directory, holder):
    (directory / LOCK_NAME).write_text(json.dumps(dataclasses.asdict(holder)))


def test_the_second_is_refused_by_name_at_once(tmp_path, holding):
    before = time.monotonic()
    message = rf"{tmp_path} is in use by process {holding.pid} on .*, since 20.*wait for it, end it"
    with pytest.raises(ConfigError, match=message), hold(tmp_path):
        pass
    with pytest.raises(ConfigError, match=f"process {holding.pid}"):
        refuse_held(tmp_path)
    assert time.monotonic() - before < 5


def test_a_killed_holder_is_not_in_the_way(tmp_path, holding):
    holding.send_signal(signal.SIGKILL)
    holding.wait()
    assert read_holder(tmp_path / LOCK_NAME).pid == holding.pid  # its lock survives it
    refuse_held(tmp_path)
    with hold(tmp_path):
        assert read_holder(tmp_path / LOCK_NAME).pid == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    put(tmp_path, elsewhere(machine=run_lock._machine(), pid=os.getpid(), born=1))
    with hold(tmp_path):
        pass


def test_a_holder_elsewhere_is_refused_at_its_next_sign_of_life(tmp_path):
    put(tmp_path, elsewhere())
    threading.Timer(0.3, put, (tmp_path, elsewhere(beats=1))).start()
    before = time.monotonic()
    with (
        pytest.raises(ConfigError, match="in use by process 1 on node7, since 2026-01-02 03:04:05"),
        hold(tmp_path, stale_s=60),
    ):
        pass
    assert time.monotonic() - before < 30


def test_a_lock_from_elsewhere_that_stands_still_is_taken_over(tmp_path, caplog):
    put(tmp_path, elsewhere(beats=7))
    with hold(tmp_path, stale_s=0.2):
        assert read_holder(tmp_path / LOCK_NAME).token != "theirs"
    assert "no sign of life" in caplog.text


def test_a_holder_beats(tmp_path):
    with hold(tmp_path, beat_s=0.02):
        deadline = time.monotonic() + 30
        while read_holder(tmp_path / LOCK_NAME).beats < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_holder(tmp_path / LOCK_NAME).beats >= 3
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_holder_whose_lock_was_taken_over_ends_its_process(tmp_path):
    program = HOLD.replace("hold(Path(sys.argv[1]))", "hold(Path(sys.argv[1]), beat_s=0.2)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], **pipes)
    assert process.stdout.readline() == "held\n"
    put(tmp_path, elsewhere())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "taken over by process 1 on node7" in said
    assert read_holder(tmp_path / LOCK_NAME).token == "theirs"


def test_a_broken_lock_is_no_lock(tmp_path):
    (tmp_path / LOCK_NAME).write_text("{half a li")
    with hold(tmp_path):
        assert read_holder(tmp_path / LOCK_NAME).pid == os.getpid()


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ConfigError, match="found a file at .*run, expected a directory"),
        hold(tmp_path / "run"),
    ):
        pass


def test_train_refuses_a_directory_in_use_before_it_starts_ranks(tmp_path, holding):
    argv = ["--model.path=m", "--data.train=q.jsonl", "--retriever.corpus=corpus", f"--run_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=f"in use by process {holding.pid}"):
        train_here(argv)
