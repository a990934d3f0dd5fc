"""A submitted job of the tests, and waiting for what becomes of it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from launch.cluster.job import training_job
from launch.cluster.layout import LayoutConfig
from launch.cluster.start import write_launch
from megatron_sd.config.load import load
from tests.slurm.cluster import CREDENTIAL_S, free_ports

ATTEMPT_S = 240  # for the longest wait of one attempt


class Job:
    """A run on two nodes without GPUs. arguments: its configuration. module: what is trained. layout: what
    differs from one rank on each of two nodes."""

    def __init__(
        self,
        run_dir: Path,
        environment: dict[str, str],
        arguments: Sequence[str],
        *,
        module: str,
        **layout: object,
    ):
        self._pending_since: float | None = None
        self.run_dir, self._environment = (
            run_dir,
            environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        config = load([*arguments, f"--run_dir={run_dir}"])
        own = {
            "nodes": 2,
            "gpus_per_node": 0,
            "ranks_per_node": 1,
            "time": "30",
            "grace_s": 60,
            "doctor": False,
        } | layout
        ports = dict(zip(("master_port", "retriever_port", "vllm_port"), free_ports(3)))
        places = LayoutConfig(cluster="slurm", **ports, **own)
        launch_dir = run_dir / "launch"
        write_launch(places, dataclasses.replace(training_job(config), module=module), launch_dir)
        self.id = re.search(r"\d+", self.run("sbatch", str(launch_dir / "job.sbatch")))[0]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False, timeout=60
        )
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
            is_lost = time.monotonic() > deadline or self.state() == "FAILED"
            assert not is_lost or holds(), f"no {what}, state {self.state()}: {self.output[-3000:]}"
            self.hasten()
            time.sleep(0.5)

    def hasten(self) -> None:
        """SLURM lets a requeued job wait for two minutes; a second after the old credential has expired is
        enough."""
        if self.state() != "PENDING":
            self._pending_since = None
        elif self._pending_since is None:
            self._pending_since = time.monotonic()
        elif time.monotonic() - self._pending_since > CREDENTIAL_S + 3:
            subprocess.run(
                ["scontrol", "update", f"JobId={self.id}", "StartTime=now"],
                env=self._environment,
                check=False,
            )

    def attempts(self) -> list[Path]:
        return sorted((self.run_dir / "attempts").glob("*"))

    def saved_steps(self) -> list[int]:
        path = self.run_dir / "steps.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []
