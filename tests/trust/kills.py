"""R1, R3 and R5: a run that is killed, or asked to stop, goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from megatron_sd.door import STOPPED_EXIT_CODE
from megatron_sd.durable import directories
from tests.trust.rows import Bench, Row, row
from tests.whole_runs.test_training import sampled_ids, without_clocks

# a kill comes so long after the start (every fourth), or after training has begun
START_S, TRAIN_S = 4.0, 5.0
GRACE_S = 30.0
FOREVER = "--num_steps=100000"


def newest(run_dir: Path) -> int:
    """The newest committed step, -1 without one."""
    found = directories.committed(run_dir / "checkpoints")
    return int(found[0].name.removeprefix("step_")) if found else -1


def attempts(run_dir: Path) -> list[int]:
    """The step that every start of the run began with."""
    path = run_dir / "attempts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def kills(bench: Bench, *, count: int) -> Row:
    """R1: one run on two ranks, killed `count` times at random moments, and started again."""
    run_dir, failures, begun = bench.directory / "kills", [], 0
    for trial in range(count):
        before = newest(run_dir)
        argv = bench.argv("kills", FOREVER, "--checkpoint.every=1")
        ranks = bench.nursery.train(argv, ranks=2, log=bench.directory / "kills.log")
        _wait_a_while(bench, run_dir, begun, in_training=trial % 4 > 0)
        first = bench.random.choice([None, 0, 1])
        ranks.signal(signal.SIGKILL, first)
        time.sleep(bench.random.uniform(0, 0.3))
        ranks.signal(signal.SIGKILL)
        ranks.wait()
        failures += [
            f"trial {trial}: {problem}"
            for problem in _after_kill(run_dir, before, len(attempts(run_dir)) > begun)
        ]
        begun = len(attempts(run_dir))
    last = newest(run_dir)
    ranks = bench.nursery.train(
        bench.argv("kills", f"--num_steps={last + 2}"), ranks=2, log=bench.directory / "kills.log"
    )
    if ranks.wait() != [0, 0] or newest(run_dir) != last + 2:
        failures.append(f"the last start did not finish: {ranks.output()[-800:]}")
    failures += [f"{path.name} leaked" for path in (run_dir / "checkpoints").glob("*.tmp")]
    failures += [f"{path.name} was unreadable" for path in (run_dir / "checkpoints").glob("*.broken")]
    figures = (
        f"{begun} starts came as far as training, {last} steps trained and committed, 0 unreadable"
        " checkpoints"
    )
    what = "kill -9 at random moments, 2 ranks: resumes from the last commit"
    return row("R1", what, failures[:count], count=count, figures=figures)


def _wait_a_while(bench: Bench, run_dir: Path, begun: int, *, in_training: bool) -> None:
    """A random time from now, or from when the start after `begun` others has come to its training."""
    deadline = time.monotonic() + 120
    while in_training and len(attempts(run_dir)) == begun and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(bench.random.uniform(0, TRAIN_S if in_training else START_S))


def _after_kill(run_dir: Path, before: int, trained: bool) -> list[str]:
    problems = []
    if newest(run_dir) < before:
        problems.append(f"the newest checkpoint went back from {before} to {newest(run_dir)}")
    if trained and attempts(run_dir)[-1] != max(before, 0):
        problems.append(f"resumed from {attempts(run_dir)[-1]}, expected {before}")
    damage = [directories.find_damage(path) for path in directories.committed(run_dir / "checkpoints")[:1]]
    return problems + [problem for problem in damage if problem]


def stops(bench: Bench, *, count: int) -> Row:
    """R5: one run on two ranks, asked to stop at `count` random moments by file or signal, to one rank or
    all."""
    run_dir, failures, seconds, phases = bench.directory / "stops", [], [], Counter()
    for trial in range(count):
        argv = bench.argv(
            "stops", FOREVER, "--checkpoint.every=0", "--log.eval_every=2", "--data.max_eval_questions=8"
        )
        begun = len(attempts(run_dir))
        ranks = bench.nursery.train(argv, ranks=2, log=bench.directory / "stops.log")
        _wait_a_while(bench, run_dir, begun, in_training=True)
        how = bench.random.choice(["file", "USR1 to all", "TERM to all", "USR1 to one", "TERM to one"])
        asked = time.monotonic()
        if how == "file":
            (run_dir / "control").mkdir(exist_ok=True)
            (run_dir / "control" / "STOP").touch()
        else:
            number = signal.SIGUSR1 if how.startswith("USR1") else signal.SIGTERM
            ranks.signal(number, None if how.endswith("all") else bench.random.randrange(2))
        codes = ranks.wait()
        seconds.append(time.monotonic() - asked)
        phases[_phase(ranks.output())] += 1
        recorded = max(without_clocks(run_dir), default=0)
        if codes != [STOPPED_EXIT_CODE] * 2 or seconds[-1] > GRACE_S or newest(run_dir) < recorded:
            failures.append(
                f"trial {trial} ({how}): exit codes {codes} after {seconds[-1]:.1f} s, saved step"
                f" {newest(run_dir)} of {recorded} recorded: {ranks.output()[-500:]}"
            )
        if (run_dir / "control" / "STOP").exists():
            failures.append(f"trial {trial}: the stop file is still there")
    where = ", ".join(f"{phase} {times}" for phase, times in phases.most_common())
    figures = (
        f"median {np.median(seconds):.1f} s, longest {max(seconds):.1f} s from the request to the exit; in"
        f" phase: {where}"
    )
    return row(
        "R5", f"stop by file or signal, 2 ranks: saved, exit 85, no step lost, within {GRACE_S:.0f} s", failures[:count],
        count=count, figures=figures,
    )  # fmt: skip


def _phase(output: str) -> str:
    words = output.partition("in phase ")[2].split(";")
    return words[0] if words[0] else "none"


def straight_or_killed(bench: Bench, *, stages: tuple[int, ...], steps: int) -> Row:
    """R3: `steps` steps at once, against half of them, kill -9, and the rest."""
    failures, compared = [], 0
    for stage in stages:
        argv = [f"--num_steps={steps}", f"--checkpoint.every={steps // 2}", f"--update.zero_stage={stage}"]
        argv += ["--log.transcripts_every=1"]
        argv += ["--distill.measure_every=2", "--distill.alpha.mode=grad_ratio"] if stage == 3 else []
        straight, killed = f"straight{stage}", f"killed{stage}"
        log = bench.directory / "straight.log"
        if bench.nursery.train(bench.argv(straight, *argv), ranks=2, log=log).wait() != [0, 0]:
            failures.append(f"ZeRO {stage}: {log} ended badly")
            continue
        ranks = bench.nursery.train(bench.argv(killed, *argv), ranks=2, log=log)
        while newest(bench.directory / killed) < steps // 2:
            time.sleep(0.02)
        time.sleep(bench.random.uniform(0, 1.0))
        ranks.signal(signal.SIGKILL)
        ranks.wait()
        if newest(bench.directory / killed) != steps // 2:
            failures.append(f"ZeRO {stage}: the kill came too late")
        if bench.nursery.train(bench.argv(killed, *argv), ranks=2, log=log).wait() != [0, 0]:
            failures.append(f"ZeRO {stage}: did not resume")
            continue
        differences, num_compared = _differences(bench.directory / straight, bench.directory / killed, steps)
        compared += num_compared
        failures += [f"ZeRO {stage}: {difference}" for difference in differences[:1]]
    figures = (
        f"{compared:,} numbers compared: weights, both moments, metrics, sampled tokens; all equal bit"
        " for bit"
    )
    what = (
        f"{steps} steps = {steps // 2} + kill -9 + {steps // 2}, 2 ranks, ZeRO {', '.join(map(str, stages))}"
    )
    return row(
        "R3", what, failures[: len(stages)], count=len(stages), figures=figures if not failures else ""
    )


def _differences(straight: Path, killed: Path, steps: int) -> tuple[list[str], int]:
    """What differs between two runs that should be one, and how many numbers were looked at."""
    differences, count = [], 0
    for path in sorted((straight / "checkpoints" / f"step_{steps:08}").rglob("*.safetensors")):
        expected, found = load_file(path), load_file(killed / path.relative_to(straight))
        count += sum(array.size for array in expected.values())
        differences += [
            f"{path.name}: {name}" for name in expected if not np.array_equal(expected[name], found[name])
        ]
    for what, read in (("metrics", without_clocks), ("sampled tokens", sampled_ids)):
        count += len(str(read(straight)).split())
        differences += [what] if read(straight) != read(killed) else []
    return differences, count
