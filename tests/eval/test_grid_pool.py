"""Worker processes of a grid: one that dies costs its run, and none lives for ever."""

import json
import sys

import pytest

from eval.grid.pool import DONE, Order, Worker, run_all
from eval.grid.worker import ANSWER

WORKER = f"""
import json, os, sys
for line in sys.stdin:
    name = json.loads(line)
    if name == "dies":
        os._exit(9)
    print("noise of a library")
    print("{ANSWER}" + json.dumps("ConfigError: no" if name == "fails" else "done"), flush=True)
"""


def test_a_worker_that_dies_costs_its_run_alone(tmp_path):
    names = ["a", "fails", "dies", "b", "c"]
    said = {}
    orders = [Order(name=name, line=json.dumps(name)) for name in names]
    command = (sys.executable, "-c", WORKER)
    run_all(orders, num_workers=2, devices=(), log_dir=tmp_path, on_end=said.__setitem__, command=command)
    assert {name: said[name] for name in ("a", "b", "c")} == dict.fromkeys("abc", DONE)
    assert said["fails"] == "ConfigError: no"
    assert "ended with exit code 9" in said["dies"]


def test_an_interrupt_ends_the_workers_and_starts_no_more_of_them(tmp_path):
    def interrupt(name, said):
        raise KeyboardInterrupt

    mark = f"import pathlib; pathlib.Path('{tmp_path}', name).touch(); "
    command = (sys.executable, "-c", WORKER.replace("    if name == ", f"    {mark}\n    if name == ", 1))
    orders = [Order(name=name, line=json.dumps(name)) for name in "abcdefgh"]
    with pytest.raises(KeyboardInterrupt):
        run_all(orders, num_workers=1, devices=(), log_dir=tmp_path, on_end=interrupt, command=command)
    assert (tmp_path / "a").exists()
    worker = Worker(command, None, tmp_path / "log")
    worker.kill()
    assert worker.run(orders[7]) == "not started"


def test_a_process_ends_after_so_many_runs_and_the_next_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.grid.pool.RUNS_PER_PROCESS", 3)
    command = (
        sys.executable,
        "-c",
        f"import os, sys\nfor _ in sys.stdin: print('{ANSWER}' + str(os.getpid()), flush=True)",
    )
    said = []
    orders = [Order(name=str(number), line="") for number in range(7)]
    run_all(
        orders,
        num_workers=1,
        devices=(),
        log_dir=tmp_path,
        on_end=lambda _, pid: said.append(pid),
        command=command,
    )
    assert [said.count(pid) for pid in dict.fromkeys(said)] == [3, 3, 1]


def test_each_worker_gets_a_device_of_its_own(tmp_path):
    say = (
        f"print('{ANSWER}' + json.dumps(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['OMP_NUM_THREADS']),"
        " flush=True)"
    )
    command = (sys.executable, "-c", f"import json, os, sys\nfor _ in sys.stdin: {say}")
    said = {}
    order = Order(name="run", line='""')
    run_all(
        [order], num_workers=4, devices=(3, 4), log_dir=tmp_path, on_end=said.__setitem__, command=command
    )
    assert said == {"run": "31"}
