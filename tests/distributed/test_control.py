"""Asking a run to stop, how often it may start, what a watchdog makes of reports; real runs are in
test_trust.py."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_sd.distributed.collectives import agree_to_stop, check_stop
from megatron_sd.distributed.control import SIGNALS, StopRequest
from megatron_sd.distributed.watchdog import Judge, Report
from megatron_sd.distributed.world import lone_world
from megatron_sd.door import STUCK_EXIT_CODE
from megatron_sd.errors import NoProgressError, StopRequested
from megatron_sd.training.safety.starts import Attempts


@pytest.fixture
def listening():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest.listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request(listening, number):
    assert listening.reason is None
    os.kill(os.getpid(), number)
    assert listening.reason == f"signal {signal.Signals(number).name}"


def test_the_stop_file_is_a_request_until_it_is_served(tmp_path, monkeypatch):
    request = StopRequest()
    request.watch(tmp_path, None)
    assert request.reason is None
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "STOP").touch()
    assert request.reason is None, "asked a moment ago"
    monkeypatch.setattr(request, "_next_check", 0.0)
    assert request.reason == f"{tmp_path}/control/STOP exists"
    request.served()
    assert not (tmp_path / "control" / "STOP").exists()
    again = StopRequest()
    again.watch(tmp_path, None)
    assert again.reason is None


def test_the_time_is_a_request(tmp_path):
    request = StopRequest()
    request.watch(tmp_path, 1e-9)
    assert request.reason == "the time of safety.stop_after_s is up"


def test_a_request_is_raised_with_the_phase():
    world = lone_world()
    check_stop(world)
    agree_to_stop(world)
    world.stop._on_signal(signal.SIGUSR1, None)
    world.pulse.move("rollout")
    for raises in (check_stop, agree_to_stop):
        with pytest.raises(StopRequested, match="signal SIGUSR1, in phase rollout"):
            raises(world)


def test_attempts_without_progress_are_refused(tmp_path):
    path, world = tmp_path / "run" / "attempts.jsonl", lone_world()
    attempts = Attempts(path, world, limit=3)
    for step in (0, 0, 5, 5, 5):
        attempts.begin(step)
    with pytest.raises(
        NoProgressError, match="the last 3 attempts began with step 5 and .* remove .*attempts.jsonl"
    ):
        attempts.begin(5)
    attempts.begin(6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 0, 5, 5, 5, 6]
    with path.open("a") as file:
        file.write('{"step": 6')  # torn by a kill
    attempts.begin(6)
    for _ in range(5):
        Attempts(path, world, limit=0).begin(6)


def report(ticks, moves, phase="update", waits=False):
    return Report(ticks=ticks, moves=moves, phase=phase, waits=waits)


def verdict_after(reports, seconds=11.0):
    """Ranks report once, and then again `seconds` later."""
    judge = Judge(2, 10.0, 0.0)
    assert judge.verdict({rank: first for rank, (first, _) in reports.items()}, 0.5) is None
    assert judge.verdict({rank: first for rank, (first, _) in reports.items()}, 9.0) is None
    return judge.verdict({rank: second for rank, (_, second) in reports.items()}, 0.5 + seconds)


def test_a_rank_that_moves_or_waits_for_one_that_does_is_fine():
    assert verdict_after({0: (report(1, 1), report(2, 2)), 1: (report(1, 1), report(2, 2))}) is None
    assert (
        verdict_after(
            {0: (report(1, 1, waits=True), report(2, 1, waits=True)), 1: (report(1, 1), report(2, 2))}
        )
        is None
    )


def test_the_rank_at_fault_is_named_with_its_phase_and_what_the_others_do():
    waits = (report(1, 1, "update", waits=True), report(2, 1, "update", waits=True))
    found = verdict_after({0: waits, 1: (report(1, 1, "rollout"), report(2, 1, "rollout"))})
    assert found.startswith(
        "rank 1 is stuck in phase rollout for 11.0 s; rank 0: update, waits for others, moved 11.0 s ago; "
    )
    assert verdict_after({0: waits, 1: waits}).startswith("rank 0 is stuck"), "all wait for each other"
    silent = verdict_after({0: (report(1, 1), report(9, 9)), 1: (report(1, 1), report(1, 1))})
    assert silent.startswith("rank 1 has not been heard of for 11.0 s")
    judge = Judge(2, 10.0, 0.0)
    assert judge.verdict({0: report(1, 1)}, 9.0) is None
    assert judge.verdict({0: report(9, 9)}, 10.1).startswith("rank 1 has not been heard of"), (
        "it never reported"
    )


PROGRAM = """
    import ctypes, sys, time
    from pathlib import Path
    from megatron_sd.distributed.watchdog import Watchdog
    from megatron_sd.distributed.world import lone_world
    world = lone_world()
    watchdog = Watchdog(world, timeout_s=float(sys.argv[2]), directory=Path(sys.argv[1]))
    watchdog.start()
    world.pulse.move("update")
    def asleep(): time.sleep(600)
    def holding(): ctypes.PyDLL(None).sleep(600)
    def moving():
        for _ in range(30): time.sleep(0.1); world.pulse.move()
        watchdog.stop(); time.sleep(2)
    globals()[sys.argv[3]]()
"""


@pytest.mark.parametrize(("what", "code"), [("asleep", STUCK_EXIT_CODE), ("holding", 1), ("moving", 0)])
def test_a_process_that_is_stuck_ends_with_its_stacks(tmp_path, what, code):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), "1.5", what]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == code
    text = (tmp_path / "rank_0.txt").read_text()
    assert (f"in {what}" in text) == (what != "moving")
    if what == "asleep":
        assert "rank 0 is stuck in phase update" in text and "in asleep" in found.stderr
