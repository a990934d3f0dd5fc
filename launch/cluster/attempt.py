"""One attempt at a run: its directory, what it found, and what follows from how it ended. The job scripts
call it.

    python -m launch.cluster.attempt begin --launch_dir RUN/launch       writes RUN/attempts/0001/..., prints the directory
    python -m launch.cluster.attempt end --launch_dir RUN/launch --exit_code N       prints done, requeue or stop

An attempt that does not commit a newer checkpoint made no progress; several in a row, and the run is given
up: a job that dies at once would otherwise take its turn in the queue for ever.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.cluster.layout import LayoutConfig
from launch.cluster.provenance import describe_software
from launch.cluster.topology import Topology, find_topology
from megatron_sd.config.command_line import parse
from megatron_sd.door import GIVEN_UP_EXIT_CODE, STOPPED_EXIT_CODE, USAGE_EXIT_CODE
from megatron_sd.durable.directories import committed
from megatron_sd.errors import ConfigError, MegatronSdError

Decision = Literal["done", "requeue", "stop"]


@dataclass(frozen=True, kw_only=True)
class AttemptConfig:
    """What the job script says."""

    launch_dir: str
    exit_code: int = 0  # of the trainers, at the end


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """first_step: of the newest checkpoint when it began. job: the attempts of one job are counted
    together, so that starting it anew by hand begins to count anew."""

    number: int
    job: str
    first_step: int

    @classmethod
    def read_all(cls, run_dir: Path) -> list[Attempt]:
        """Those that began, oldest first."""
        records = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(run_dir.glob("attempts/*/attempt.json"))
        ]
        return [cls(number=r["number"], job=r["job"], first_step=r["first_step"]) for r in records]


def newest_step(run_dir: Path) -> int:
    """Of the newest committed checkpoint, 0 without one."""
    found = committed(run_dir / "checkpoints")
    return int(found[0].name.removeprefix("step_")) if found else 0


def num_without_progress(attempts: Sequence[Attempt], job: str, step: int) -> int:
    """How many of the job's last attempts in a row began at the step that is still the newest.

    >>> begun = [Attempt(number=n, job="7", first_step=step) for n, step in enumerate([0, 20, 20])] >>>
    num_without_progress(begun, "7", 20), num_without_progress(begun, "7", 40), num_without_progress(begun,
    "8", 20) (2, 0, 0)
    """
    own = [attempt for attempt in attempts if attempt.job == job]
    stuck = 0
    while stuck < len(own) and own[-1 - stuck].first_step >= step:
        stuck += 1
    return stuck


def decide(exit_code: int, *, step: int, num_steps: int, stuck: int, most_stuck: int) -> tuple[Decision, str]:
    """What follows from the trainers' exit code, and why. A killed launcher can end with 0, which alone is
    not believed."""
    if exit_code == 0 and step >= num_steps:
        return "done", f"step {step} of {num_steps} is committed"
    if exit_code == USAGE_EXIT_CODE:
        return "stop", "the configuration was refused (exit code 2); the message stands above"
    how = "saved and stopped" if exit_code == STOPPED_EXIT_CODE else f"ended with exit code {exit_code}"
    if stuck >= most_stuck:
        return (
            "stop",
            (
                f"{how} at step {step} of {num_steps}, and so did {stuck} attempts in a row without a new"
                " checkpoint: see their logs; a longer time, a smaller checkpoint.every, or a smaller step"
                " helps a run that is only too slow"
            ),
        )
    return "requeue", f"{how} at step {step} of {num_steps}"


def begin(launch_dir: Path) -> Path:
    """Make the attempt's directory: attempt.json, topology.json, hostfile, arguments, job.env, git.txt,
    git.diff, packages.txt, environment.txt. Raises ConfigError when the job's attempts made no progress as
    often as they may."""
    layout, config_text = read_launch(launch_dir)
    run_dir, job, step = launch_dir.parent, job_id(), newest_step(launch_dir.parent)
    earlier = Attempt.read_all(run_dir)
    stuck = num_without_progress(earlier, job, step)
    if stuck >= layout.max_attempts_without_progress:
        raise ConfigError(
            f"{run_dir}: {stuck} attempts of job {job} in a row ended at step {step}, expected progress: see"
            " them"
        )
    number = max((attempt.number for attempt in earlier), default=0) + 1
    directory = run_dir / "attempts" / f"{number:04}"
    directory.mkdir(parents=True)
    topology = find_topology(layout, yaml.safe_load(config_text), number)
    if topology.retrievers:
        secret = f"--retriever.client.token_file={launch_dir / 'retriever.token'}"
        topology = dataclasses.replace(topology, arguments=(*topology.arguments, secret))
    files = describe_software(dict(os.environ)) | _topology_files(topology, directory)
    files["config.yaml"] = config_text
    files["attempt.json"] = json.dumps(
        {"number": number, "job": job, "first_step": step, "began": time.time()}, indent=1
    )
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def end(launch_dir: Path, exit_code: int) -> tuple[Decision, str]:
    """Note how the newest attempt ended; what follows, and why."""
    layout, config_text = read_launch(launch_dir)
    run_dir = launch_dir.parent
    step, attempts = newest_step(run_dir), Attempt.read_all(run_dir)
    decision, reason = decide(
        exit_code,
        step=step,
        num_steps=yaml.safe_load(config_text)["num_steps"],
        stuck=num_without_progress(attempts, job_id(), step),
        most_stuck=layout.max_attempts_without_progress,
    )
    record = {
        "exit_code": exit_code,
        "last_step": step,
        "decision": decision,
        "reason": reason,
        "ended": time.time(),
    }
    path = run_dir / "attempts" / f"{attempts[-1].number:04}" / "end.json"
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return decision, reason


def read_launch(launch_dir: Path) -> tuple[LayoutConfig, str]:
    """The layout and the resolved training configuration that `sd-search launch` wrote."""
    values: dict[str, Any] = yaml.safe_load((launch_dir / "layout.yaml").read_text(encoding="utf-8"))
    layout = LayoutConfig(**values | {"sbatch": tuple(values["sbatch"])})
    return layout, (launch_dir / "config.yaml").read_text(encoding="utf-8")


def job_id() -> str:
    """SLURM's, which a requeued job keeps, or that of the script that starts attempt after attempt."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("MEGATRON_SD_JOB", "none")


def _topology_files(topology: Topology, directory: Path) -> dict[str, str]:
    variables = topology.variables() | {"ATTEMPT_DIR": str(directory)}
    return {
        "topology.json": topology.to_json(),
        "hostfile": topology.hostfile(),
        "nodes.txt": "".join(f"{host.name}\n" for host in topology.nodes),
        "arguments": "".join(f"{argument}\n" for argument in topology.arguments),
        "job.env": "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()),
    }


def main(argv: Sequence[str]) -> int:
    """The command line."""
    verb, *rest = argv or [""]
    try:
        config = parse(AttemptConfig, rest, "python -m launch.cluster.attempt")
        launch_dir = Path(config.launch_dir).resolve()
        if verb == "begin":
            print(begin(launch_dir))
        elif verb == "end":
            decision, reason = end(launch_dir, config.exit_code)
            print(decision)
            print(f"attempt: {decision}: {reason}", file=sys.stderr)
        else:
            raise ConfigError(f"python -m launch.cluster.attempt: found {verb!r}, expected begin or end")
    except (MegatronSdError, OSError) as error:
        print(f"attempt: {error}", file=sys.stderr)
        return GIVEN_UP_EXIT_CODE
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
