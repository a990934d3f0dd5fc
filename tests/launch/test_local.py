"""Training on this machine: what is said before it starts and when it ends, and that nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import psutil
import pytest

from launch import local
from launch.local import check_memory, killed_message, ranks_under
from launch.planner.memory import GIB
from megatron_sd.config import ModelConfig
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError, MegatronSdError
from megatron_sd.machine import processor_flags

START_POLICY = Path(str(files("data_prep"))) / "coldstart_model"


def configured(*overrides):
    required = [
        "--run_dir=r",
        "--model.path=qwen2.5-0.5b",
        "--data.train=q",
        "--retriever.corpus=c",
        "--model.dtype=float32",
    ]
    return load([*required, *overrides])


def with_memory(monkeypatch, gib):
    monkeypatch.setattr(local, "has_gpu", lambda: False)
    monkeypatch.setattr(
        local.psutil, "virtual_memory", lambda: type("Memory", (), {"available": int(gib * GIB)})
    )


def test_a_run_that_does_not_fit_is_refused_or_warned_of(monkeypatch, capsys):
    """0.5 G parameters in float32 with the defaults: more than the 23 GiB at which such a run was killed."""
    with_memory(monkeypatch, 23)
    with pytest.raises(
        ConfigError,
        match=r"safety.check_memory: memory: planned .* GiB for 1 ranks together .*found 23.0 GiB",
    ):
        check_memory(configured("--safety.check_memory=refuse"), 1)
    assert check_memory(configured(), 1)
    assert "sd-search: warning: memory: planned" in capsys.readouterr().err
    assert check_memory(configured("--safety.check_memory=off"), 1) == ()
    with_memory(monkeypatch, 1e6)
    assert check_memory(configured("--safety.check_memory=refuse"), 1) == ()


def test_a_rank_that_the_system_ended_is_explained(monkeypatch):
    kill_itself = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(local, "command_line", lambda *_: kill_itself)
    message = r"ended by the system \(SIGKILL\).*memory ran out.*The planner says: planned 40 GiB"
    with pytest.raises(MegatronSdError, match=message):
        local.start_ranks(1, [], ["planned 40 GiB"])
    assert "The planner" not in killed_message(2, ())


WAITING_RANK = "import time, sys; print('up', flush=True); time.sleep(60)"
PARENT = """
import sys
from launch import local
local.command_line = lambda *_: [sys.executable, "-c", {rank!r}, "megatron_sd.train"]
try:
    local.start_ranks(1, [])
except SystemExit as error:
    sys.exit(error.code)
"""
STOPS = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85));" + WAITING_RANK


def parent_of(rank):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(rank=rank)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_handed_on_to_the_ranks_which_save_and_stop(number):
    process = parent_of(STOPS)
    process.send_signal(number)
    assert process.wait(60) == 85


def test_before_there_are_ranks_a_signal_ends_their_launcher():
    words = PARENT.format(rank=WAITING_RANK).replace(', "megatron_sd.train"]', ', "a launcher"]')
    process = subprocess.Popen(
        [sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1 and "megatron_sd.train ended with exit code -15" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_one_who_started_it(number):
    process = parent_of(WAITING_RANK)
    (rank,) = ranks_under(process.pid)[-1:]
    process.send_signal(number)
    process.wait(60)
    assert _ends(rank)


@pytest.mark.ranks
def test_several_ranks_end_with_a_killed_command_though_launchers_stand_between(tmp_path):
    program = "tests.rank_programs.wait_for_ever"
    words = f"import sys; from launch import local; local.start_ranks(2, sys.argv[1:], program={program!r})"
    command = subprocess.Popen([sys.executable, "-c", words, str(tmp_path)])
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("rank_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [psutil.Process(int(path.read_text())) for path in sorted(tmp_path.glob("rank_*"))]
    assert len(ranks) == 2
    command.kill()
    command.wait()
    assert all(_ends(rank) for rank in ranks)


def _ends(process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_auto_takes_bfloat16_only_where_it_is_not_emulated(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert (
        processor_flags(cpuinfo) == {"fpu", "avx2", "avx512_bf16"}
        and processor_flags(tmp_path / "none") == frozenset()
    )
    assert ModelConfig(path="m").dtype in ("float32", "bfloat16")
    assert ModelConfig(path="m", dtype="bfloat16").dtype == "bfloat16"


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    from megatron_sd.errors import DataError
    from megatron_sd.search.tokens import load_codec

    (tmp_path / "config.json").write_text((START_POLICY / "config.json").read_text())
    with pytest.raises(DataError, match=f"no tokenizer in {tmp_path}, expected tokenizer.json"):
        load_codec(str(tmp_path))
    assert os.listdir(tmp_path) == ["config.json"]
