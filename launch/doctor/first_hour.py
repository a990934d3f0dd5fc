"""`make gpu-check-all`: the first hour on a GPU node, one step after another, each with what is expected
and what to send us.

    python -m launch.doctor.first_hour --gpus 8 --dry_run     prints the plan; without --gpus the machine's are counted

Needs models/Qwen2.5-0.5B and -3B, data/questions.jsonl and data/corpus (README). A step that fails does not
end the hour. No GPU has run it yet: the figures expected are the planner's and the audit's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.node_facts import gpus
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError, MegatronSdError

POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class FirstHourConfig:
    """gpus: of this machine; None: counted by nvidia-smi."""

    gpus: int | None = None
    output: str = "runs/gpu-check-all"
    step_limit_s: float = 1800.0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command. needs: GPUs. kills_worker: once a vLLM server of the run is there, it is killed."""

    name: str
    command: tuple[str, ...]
    expected: str
    send: str
    needs: int = 1
    kills_worker: bool = False


def main(argv: Sequence[str]) -> None:
    """Raises MegatronSdError naming the steps that failed."""
    config = parse(FirstHourConfig, argv, "first hour")
    num_gpus = len(gpus()) if config.gpus is None else config.gpus
    if num_gpus < 1:
        raise ConfigError(
            f"gpus: found {num_gpus}, expected 1 or more: run it where nvidia-smi lists GPUs, or pass --gpus"
        )
    steps = plan(num_gpus, config.output)
    failed = []
    for step in steps:
        print(describe(step), flush=True)
        if not config.dry_run and not run(step, Path(config.output), limit_s=config.step_limit_s):
            failed.append(step.name)
            print(f"FAILED {step.name}: send {step.send}", flush=True)
    if failed:
        raise MegatronSdError(f"failed: {', '.join(failed)}; their logs are in {config.output}")


def plan(num_gpus: int, output: str) -> list[Step]:
    """The steps that this many GPUs can run, in order."""
    train = (sys.executable, "-m", "launch.cli", "train")
    smoke = _run(train, "smoke-1gpu", f"{output}/smoke", 1)
    steps = [
        Step(
            name="gpu-check",
            command=("make", "gpu-check"),
            expected="every line ok; ratios in the table",
            send="its output",
        ),
        Step(
            name="gpu-check-train",
            command=("make", "gpu-check-train"),
            expected="memory within 15 % of the plan beside it",
            send="its table",
        ),
        Step(
            name="smoke-1gpu",
            command=smoke,
            expected="5 steps, loss finite, logprob_gap_nats below 0.02",
            send=f"{output}/*.log",
        ),
        _beside(train, output, "checksums", num_gpus, size=1),
        _beside(train, output, "tensor-parallel", num_gpus, size=2),
        Step(
            name="colocated",
            command=(*_run(train, "paper-3b", f"{output}/colocated", 2), *COLOCATED),
            expected="3 steps, both ranks sample after each publish, logprob_gap_nats below 0.02",
            send=f"{output}/colocated.log and the stack of each rank",
            needs=2,
        ),
        dataclasses.replace(
            _beside(train, output, "killed-worker", num_gpus, size=1),
            expected=(
                "the log says that a version was not handed over or a server was started again; 3 steps all"
                " the same"
            ),
            kills_worker=True,
        ),
    ]
    return [step for step in steps if step.needs <= num_gpus]


COLOCATED = (
    "--rollout.vllm.placement=colocated",
    "--rollout.vllm.num_replicas=1",
    "--rollout.vllm.devices=[]",
    "--rollout.vllm.kv_cache_gib=10",
    "--update.max_microbatch_tokens=8192",
    "--update.offload_optimizer=cpu",
)


def _run(train: tuple[str, ...], recipe: str, run_dir: str, num_ranks: int) -> tuple[str, ...]:
    own = (f"--config=launch/configs/{recipe}.yaml", f"--run_dir={run_dir}", f"--num-ranks={num_ranks}")
    steps = (
        ("--num_steps=3", "--checkpoint.every=0", "--checkpoint.resume=false") if recipe == "paper-3b" else ()
    )
    return (*train, *own, *steps)


def _beside(train: tuple[str, ...], output: str, name: str, num_gpus: int, *, size: int) -> Step:
    """paper-3b for three steps: half of the GPUs train, half serve with this tensor-parallel size."""
    num_ranks = max(num_gpus // 2, 1)
    num_servers = max((num_gpus - num_ranks) // size, 1)
    devices = list(range(num_ranks, num_ranks + num_servers * size))
    small = (
        () if num_ranks >= 4 else ("--update.offload_optimizer=cpu", "--update.max_microbatch_tokens=8192")
    )
    options = (
        f"--rollout.vllm.tensor_parallel_size={size}",
        f"--rollout.vllm.num_replicas={num_servers}",
        f"--rollout.vllm.devices={str(devices).replace(' ', '')}",
        "--publish.checksums=true",
    )
    return Step(
        name=name,
        command=(*_run(train, "paper-3b", f"{output}/{name}", num_ranks), *options, *small),
        expected="3 steps, no checksum differs, a publish below 1 s, logprob_gap_nats below 0.02",
        send=f"{output}/{name}.log and {output}/{name}/vllm/*.log",
        needs=num_ranks + num_servers * size,
    )


def describe(step: Step) -> str:
    """What is about to run, and what to look for."""
    killed = "\n   a vLLM worker is killed (kill -9) in it" if step.kills_worker else ""
    words = f"   expected: {step.expected}\n   if it fails, send: {step.send}"
    return f"== {step.name}\n   {shlex.join(step.command)}{killed}\n{words}"


def run(step: Step, output: Path, *, limit_s: float) -> bool:
    """Run it with its output in a log; False when it failed or took longer than limit_s."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        if step.kills_worker:
            threading.Thread(target=kill_a_worker, args=(process, output / step.name), daemon=True).start()
        try:
            return process.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False


def kill_a_worker(process: subprocess.Popen, run_dir: Path) -> None:
    """When the first step is recorded the next one is under way: kill one vLLM server of the run, in its
    publish or before."""
    while process.poll() is None and not (run_dir / "metrics.jsonl").is_file():
        time.sleep(POLL_S)
    for pid in descendants(process.pid):
        if b"megatron_sd.rollout.vllm.server_main" in command_of(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return


def command_of(pid: int) -> bytes:
    """A process's command line; nothing when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    done = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    children = [int(word) for word in done.stdout.split()]
    return [*children, *(below for child in children for below in descendants(child))]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MegatronSdError as failure:
        print(f"first hour: {failure}", file=sys.stderr)
        raise SystemExit(1) from failure
