"""Several "machines" on this one: launchers of their own that meet over the network, and the doctor's
processes."""

import dataclasses
import json
import socket
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_prep.world.world import WorldConfig
from launch.cluster.start import main
from launch.doctor.checks import DoctorConfig, driver_problem, judge
from launch.programs import make_world
from megatron_sd.distributed.preflight import neighbour
from megatron_sd.distributed.world import EXPECTED_SIZE
from tests.nursery import nursery

pytestmark = pytest.mark.ranks
NUM_STEPS = 2
LIMIT_S = 400


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("world") / "world"
    make_world(WorldConfig(output=str(output), num_train_questions=40, num_eval_questions=10))
    return output


def launch(world: Path, run_dir: Path, *layout: str) -> None:
    given = {
        "run_dir": run_dir,
        "num_steps": NUM_STEPS,
        "model.path": files("data_prep") / "coldstart_model",
        "data.train": world / "questions.jsonl",
        "retriever.corpus": world / "corpus",
        "master_port": free_port(),
    }
    main(["--recipe=smoke-cpu", *(f"--{key}={value}" for key, value in given.items()), *layout])


def parameters(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / f"step_{NUM_STEPS:08}" / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_machines_train_as_one_does(world, tmp_path, monkeypatch):
    """Two of DeepSpeed's launchers, one rank each, against one launcher of two ranks: the same bits, and a
    record of it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/bash\nexec bash -c "$2"\n')  # in the place of ssh: HOST COMMAND
    shell.chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    launch(world, tmp_path / "one", "--doctor=false")
    two = (
        "--cluster=hosts",
        "--nodes=2",
        "--ranks_per_node=1",
        f"--hostfile={hostfile}",
        f"--remote_shell={shell}",
    )
    launch(world, tmp_path / "two", *two)
    expected, found = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    attempt = tmp_path / "two" / "attempts" / "0001"
    assert (attempt / "hostfile").read_text() == hostfile.read_text()
    assert json.loads((attempt / "topology.json").read_text())["world_size"] == 2
    assert json.loads((attempt / "end.json").read_text())["decision"] == "done"
    names = {path.name for path in attempt.iterdir()}
    assert {"config.yaml", "git.txt", "git.diff", "packages.txt", "environment.txt", "attempt.json"} <= names
    assert "deepspeed==" in (attempt / "packages.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code"), [("2", 0), ("4", 3)])
def test_another_number_of_ranks_than_was_asked_for_is_refused(asked, code):
    ranks = nursery().start("tests.rank_programs.join:run", None, ranks=2, environment={EXPECTED_SIZE: asked})
    assert ranks.wait(LIMIT_S) == [code, code], ranks.output()
    assert code == 0 or all(
        "WORLD_SIZE is 2, expected 4, which MEGATRON_SD_WORLD_SIZE asks for" in ranks.output_of(rank)
        for rank in range(2)
    )


def doctors(run_dir: Path, present: list[int], *options: str) -> list[tuple[int, str]]:
    argv = [f"--run_dir={run_dir}", "--hosts=[ant,bee,cat]"]
    argv += ["--min_free_gib=0.1", f"--address=127.0.0.1:{free_port()}", "--min_open_files=16", *options]
    started = [
        nursery().start("tests.rank_programs.join:doctor", [*argv, f"--number={number}"], ranks=1)
        for number in present
    ]
    return [(*one.wait(LIMIT_S), one.output()) for one in started]


def test_three_nodes_that_are_well(tmp_path):
    found = doctors(tmp_path, [0, 1, 2])
    assert [code for code, _ in found] == [0, 0, 0], found
    assert "3 nodes in" in found[0][1]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_neighbours_agree_and_every_link_is_used(size):
    links = set()
    for first in (0, 1):
        turns = {
            number: turn for number in range(size) if (turn := neighbour(number, size, first)) is not None
        }
        for number, (peer, speaks) in turns.items():
            assert turns[peer] == (number, not speaks)
            links.add((min(number, peer), max(number, peer)))
    assert links == {(number, number + 1) for number in range(size - 1)}


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named_in_time(tmp_path):
    started = time.monotonic()
    for code, output in doctors(tmp_path, [0, 1], "--timeout_s=10"):
        assert code == 1 and "not fit for a run: cat;" in output
    assert time.monotonic() - started < 120


def test_a_retriever_that_is_not_ready_and_a_full_disk_are_named(tmp_path):
    (code, output), *_ = doctors(
        tmp_path, [0, 1, 2], f"--endpoints=[http://127.0.0.1:{free_port()}]", "--min_free_gib=1e9"
    )
    assert code == 1
    assert "ant: retriever not ready: http://127.0.0.1" in output and "refused" in output
    assert "GiB free, expected 1e+09 or more" in output


WELL = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "c0ffee",
    "gpus": [{"name": "H100"}],
    "unready": [],
    "unseen": [],
    "free_gib": {"/run": 900.0, "/dev/shm": 60.0},
    "open_files": 65536,
    "clock": 1000.0,
    "rates": (20.0, 22.0),
    "network": "",
}


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (
            {"versions": {"python": "3.11.7", "torch": "2.12.0"}},
            "torch version: found 2.12.0, expected 2.13.0 as on most nodes",
        ),
        ({"commit": "beef"}, "commit: found beef, expected c0ffee"),
        ({"gpus": []}, "GPUs: found none, expected H100"),
        (
            {"gpus": [{"name": "H100", "ecc.errors.uncorrected.volatile.total": "3"}]},
            "GPU 0 has 3 uncorrected memory errors",
        ),
        (
            {"gpus": [{"name": "H100", "clocks_throttle_reasons.hw_slowdown": "Active"}]},
            "GPU 0 is slowed down",
        ),
        ({"free_gib": {"/run": 900.0, "/dev/shm": 0.06}}, "/dev/shm has 0.1 GiB free, expected 1 or more"),
        ({"open_files": 256}, "ulimit -n is 256"),
        ({"clock": 1007.0}, "clock +7.0 s from most, expected at most 2"),
        ({"unseen": [0, 2, 3]}, "does not see what ant, cat, dog wrote to run_dir"),
        (
            {"network": "messages between nodes do not get through: x"},
            "messages between nodes do not get through: x",
        ),
        ({"rates": (20.0, 0.5)}, "messages of 16 MiB at 0.50 GB/s, expected about 22.00"),
    ],
)
def test_the_host_at_fault_is_named(fault, problem):
    hosts = ("ant", "bee", "cat", "dog")
    reports = [WELL | (fault if host == "bee" else {}) for host in hosts]
    findings = judge(reports, hosts, DoctorConfig(run_dir="r"))
    assert {finding.host for finding in findings} == {"bee"}
    assert any(problem in finding.problem for finding in findings), findings


def test_a_file_that_nobody_sees_is_its_writers_fault():
    hosts = ("ant", "bee", "cat", "dog")
    reports = [WELL | {"unseen": [] if host == "bee" else [1]} for host in hosts]
    (finding,) = judge(reports, hosts, DoctorConfig(run_dir="r"))
    assert (finding.host, finding.problem) == ("bee", "its file in run_dir is not seen by ant, cat, dog")
    slow = dataclasses.replace(DoctorConfig(run_dir="r"), min_reduce_gb_s=100.0)
    rates = [WELL | {"rates": (20.0, 9.0 if host == "cat" else 22.0)} for host in hosts]
    (finding,) = judge(rates, hosts, slow)
    assert finding.host == "cat" and "all-reduce at 20.00 GB/s, expected 100" in finding.problem


@pytest.mark.parametrize(
    ("driver", "cuda", "is_told"),
    [("570.86.15", "13.0", True), ("580.65.06", "13.0", False), ("570.86.15", "12.8", False)],
)
def test_a_driver_that_is_too_old_for_torch_is_told(driver, cuda, is_told):
    """torch 2.13 from PyPI is a CUDA 13 build; a CPU build or an unknown driver says nothing."""
    problems = driver_problem(driver, cuda, 3)
    assert bool(problems) == is_told
    assert not is_told or problems[0].startswith(
        "GPU 3 has driver 570.86.15, expected 580 or newer for torch's CUDA 13.0"
    )
    assert driver_problem(driver, "", 0) == driver_problem("", cuda, 0) == []
