"""The job script under a real SLURM (slurmctld and slurmd on this machine): told to stop, it saves,
requeues, and goes on.

SLURM_CYCLES=30 python -m pytest tests/slurm for the long run.
"""

import json
import os
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import Job

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
NUM_CYCLES = int(os.environ.get("SLURM_CYCLES", "2"))


def stand_in(run_dir: Path, environment: dict[str, str], *, num_steps: int, **layout: object) -> Job:
    required = {
        "model.path": "none",
        "data.train": "none",
        "retriever.corpus": "none",
        "num_steps": num_steps,
    }
    arguments = [f"--{key}={value}" for key, value in required.items()]
    return Job(run_dir, environment, arguments, module="tests.slurm.stand_in", **layout)


def test_told_to_stop_it_saves_and_goes_on_until_it_is_done(cluster, tmp_path):
    """Steps rise strictly; one attempt a cycle, each with its own record; the last one ends by itself."""
    job = stand_in(tmp_path / "run", cluster, num_steps=10_000)
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
    assert topology["world_size"] == 2 and [host["name"] for host in topology["trainers"]] == [
        "node1",
        "node2",
    ]


def test_a_run_that_gets_nowhere_is_given_up(cluster, tmp_path):
    """Three attempts, then no more."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stuck").touch()
    job = stand_in(tmp_path / "run", cluster, num_steps=10)
    job.wait_for(lambda: job.state() == "FAILED", "end of the run")
    assert [json.loads((path / "end.json").read_text())["decision"] for path in job.attempts()] == [
        "requeue",
        "requeue",
        "stop",
    ]
    assert "3 attempts in a row without a new checkpoint" in job.output


def test_the_end_of_the_walltime_is_such_a_stop(cluster, tmp_path):
    job = stand_in(tmp_path / "run", cluster, num_steps=10_000, time="2", grace_s=60)  # told after a minute
    job.wait_for(
        lambda: job.attempts() and (job.attempts()[0] / "end.json").exists(), "end of the first attempt"
    )
    end = json.loads((job.attempts()[0] / "end.json").read_text())
    assert (end["exit_code"], end["decision"]) == (85, "requeue") and end["last_step"] > 0
    job.run("scancel", job.id)
