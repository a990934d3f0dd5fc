"""The job script under a real SLURM (slurmctld and slurmd on this machine): told to stop, it saves, requeues, and goes on.

SLURM_CYCLES=30 python -m pytest tests/slurm for the long run.
"""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from launch.layout import LayoutConfig
from launch.render import render_files
from megatron_sd.config import load
from tests.slurm.cluster import CREDENTIAL_S, slurm, why_not

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
NUM_CYCLES = int(os.environ.get("SLURM_CYCLES", "2"))
ATTEMPT_S = 240  # for the longest wait of one attempt


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        print(f"SLURM's tests do not run: {reason}")
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm"), num_nodes=2) as environment:
        yield environment


class Job:
    """A submitted run of the stand-in on two nodes."""

    def __init__(self, run_dir: Path, environment: dict[str, str], *, num_steps: int, time: str = "30", grace_s: int = 60):
        self._pending_since: float | None = None
        self.run_dir, self._environment = run_dir, environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        required = {"run_dir": run_dir, "model.path": "none", "data.train": "none", "retriever.corpus": "none"}
        config = load([f"--{key}={value}" for key, value in (required | {"num_steps": num_steps}).items()])
        layout = LayoutConfig(
            cluster="slurm", nodes=2, gpus_per_node=0, ranks_per_node=1, time=time, grace_s=grace_s, doctor=False,
            master_port=20_000 + os.getpid() % 10_000,
        )  # fmt: skip
        launch_dir = run_dir / "launch"
        launch_dir.mkdir(parents=True)
        for name, text in render_files(layout, config, launch_dir, module="tests.slurm.stand_in").items():
            (launch_dir / name).write_text(text)
        self.id = re.search(r"\d+", self.run("sbatch", str(launch_dir / "job.sbatch")))[0]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def output(self) -> str:
        path = self.run_dir / "launch" / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", self.id))[1]

    def tell(self) -> None:
        """As SLURM does by --signal=B:USR1, when the time is nearly up."""
        self.run("scancel", "--batch", "--signal=USR1", self.id)

    def wait_for(self, holds, what: str) -> None:
        deadline = time.monotonic() + ATTEMPT_S
        while not holds():
            assert time.monotonic() < deadline, f"no {what}, state {self.state()}: {self.output[-3000:]}"
            self.hasten()
            time.sleep(0.5)

    def hasten(self) -> None:
        """SLURM lets a requeued job wait for two minutes; a second after the old credential has expired is enough."""
        if self.state() != "PENDING":
            self._pending_since = None
        elif self._pending_since is None:
            self._pending_since = time.monotonic()
        elif time.monotonic() - self._pending_since > CREDENTIAL_S + 3:
            subprocess.run(["scontrol", "update", f"JobId={self.id}", "StartTime=now"], env=self._environment, check=False)

    def attempts(self) -> list[Path]:
        return sorted((self.run_dir / "attempts").glob("*"))

    def saved_steps(self) -> list[int]:
        path = self.run_dir / "steps.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_told_to_stop_it_saves_and_goes_on_until_it_is_done(cluster, tmp_path):
    """Steps rise strictly; one attempt a cycle, each with its own record; the last one ends by itself."""
    job = Job(tmp_path / "run", cluster, num_steps=10_000)
    for cycle in range(1, NUM_CYCLES + 1):
        job.wait_for(lambda number=cycle: len(job.attempts()) == number, f"attempt {cycle}")
        early = cycle % 5 == 1  # told before any rank is there: that attempt makes no progress
        if not early:
            job.wait_for(lambda: (job.attempts()[-1] / "trains").exists(), f"training in attempt {cycle}")
            time.sleep(cycle % 3)
        job.tell()
        job.wait_for(lambda: (job.attempts()[-1] / "end.json").exists(), f"end of attempt {cycle}")
        print(f"cycle {cycle}: steps {job.saved_steps()}", flush=True)
    config = job.run_dir / "launch" / "config.yaml"
    last = max([0, *job.saved_steps()]) + 3
    config.write_text(config.read_text().replace("num_steps: 10000", f"num_steps: {last}"))
    job.wait_for(lambda: job.state() == "COMPLETED", "end of the run")
    steps = job.saved_steps()
    assert steps[-1] == last and all(earlier < later for earlier, later in zip(steps, steps[1:]))
    ends = [json.loads((path / "end.json").read_text()) for path in job.attempts()]
    assert [end["decision"] for end in ends] == ["requeue"] * NUM_CYCLES + ["done"]
    assert [end["exit_code"] for end in ends] == [85] * NUM_CYCLES + [0]
    reached = [end["last_step"] for end in ends]
    assert sorted(set(reached) - {0}) == steps and reached == sorted(reached)
    topology = json.loads((job.attempts()[0] / "topology.json").read_text())
    assert topology["world_size"] == 2 and [host["name"] for host in topology["trainers"]] == ["node1", "node2"]


def test_a_run_that_gets_nowhere_is_given_up(cluster, tmp_path):
    """Three attempts, then no more."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stuck").touch()
    job = Job(tmp_path / "run", cluster, num_steps=10)
    job.wait_for(lambda: job.state() == "FAILED", "end of the run")
    assert [json.loads((path / "end.json").read_text())["decision"] for path in job.attempts()] == ["requeue", "requeue", "stop"]
    assert "3 attempts in a row without a new checkpoint" in job.output


def test_the_end_of_the_walltime_is_such_a_stop(cluster, tmp_path):
    job = Job(tmp_path / "run", cluster, num_steps=10_000, time="1", grace_s=35)
    job.wait_for(lambda: job.attempts() and (job.attempts()[0] / "end.json").exists(), "end of the first attempt")
    end = json.loads((job.attempts()[0] / "end.json").read_text())
    assert (end["exit_code"], end["decision"]) == (85, "requeue") and end["last_step"] > 0
    job.run("scancel", job.id)
