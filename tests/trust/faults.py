"""R7, R8 and R9: a rank that does not go on, numbers that are not finite, gradients that are too large."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sd.distributed.watchdog import LAST_RESORT
from megatron_sd.training.safety.stability import SpikeGuard
from tests.trust.disk import tiny_model
from tests.trust.kills import FOREVER, _differences
from tests.trust.rows import Bench, Row, row
from tests.whole_runs.test_training import without_clocks

KINDS = ("stuck", "held", "broken", "dead")
PLACES = ("rollout", "update", "save")
CALL = 3  # of the place: the third step, after the first checkpoints


def stuck_ranks(
    bench: Bench, *, kinds: Sequence[str], places: Sequence[str], timeout_s: float, at: Sequence[int] = (0, 1)
) -> Row:
    """R7: a rank (each of `at`) sleeps for ever, holds the interpreter, raises or dies in a rollout, an
    update or a save."""
    failures, seconds = [], []
    cases = [(kind, place, rank) for kind in kinds for place in places for rank in at]
    for kind, place, rank in cases:
        name = f"stuck_{kind}_{place}_{rank}"
        times = bench.directory / f"{name}.time"
        argv = bench.argv(name, FOREVER, "--checkpoint.every=1", f"--safety.watchdog_s={timeout_s}")
        order = {"argv": argv, "rank": rank, "kind": kind, "place": place, "call": CALL, "times": f"{times}"}
        ranks = bench.nursery.start(
            "tests.rank_programs.trust:train", order, ranks=2, log=bench.directory / f"{name}.log"
        )
        while not times.exists() and ranks.code(0, 0.05) is None:
            pass
        codes = ranks.wait(timeout_s * 6 + 120)
        seconds.append(time.time() - float(times.read_text()))
        text = ranks.output() + "".join(
            path.read_text() for path in (bench.directory / name / "watchdog").glob("*.txt")
        )
        missing = [word for word in _words(kind, place, rank) if word not in text]
        if 0 in codes or missing:
            failures.append(
                f"{kind} in {place} on rank {rank}: exit codes {codes}, missing {missing}: {text[-1500:]}"
            )
    late = sum(took > 1.5 * timeout_s for took in seconds)
    figures = f"longest {max(seconds):.1f} s with a timeout of {timeout_s:.0f} s ({late} beyond 1.5 timeouts)"
    what = "a rank stuck, holding the interpreter, broken or dead: all ranks end, with stacks and the phase"
    return row("R7", what, failures, count=len(cases), figures=figures)


def _words(kind: str, place: str, rank: int) -> list[str]:
    """What must have been printed by whom."""
    if kind == "broken":
        return ["broken on purpose"]
    if kind == "dead":
        return []
    asleep = "in stuck" if kind == "stuck" else "in hold_the_interpreter"
    assert LAST_RESORT < 1.5
    phase = [f"rank {rank} is stuck in phase {place}"] if kind == "stuck" else []
    return [asleep, *phase, "most recent call first"]


def not_finite(bench: Bench, *, stages: tuple[int, ...]) -> Row:
    """R8: NaN and infinity in logits, teacher, gradients, advantages and log-probabilities of rank 1
    alone."""
    failures, count = [], 0
    for stage in stages:
        output = bench.directory / f"not_finite{stage}.json"
        order = {"model": f"{tiny_model(bench)}", "stage": stage, "rank": 1, "output": f"{output}"}
        ranks = bench.nursery.start(
            "tests.rank_programs.trust:steps", order, ranks=2, log=bench.directory / "not_finite.log"
        )
        if ranks.wait(300) != [0, 0]:
            failures.append(f"ZeRO {stage}: {ranks.output()[-1500:]}")
            continue
        outcomes = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(2)]
        for name in outcomes[0]:
            count += 1
            found = [outcome[name] for outcome in outcomes]
            if not all(all(own.values()) for own in found):
                failures.append(f"ZeRO {stage}, {name}: {found}")
    what = (
        f"not finite on rank 1 only, ZeRO {', '.join(map(str, stages))}: both skip the step, parameters"
        " identical"
    )
    return row("R8", what, failures, count=max(count, len(failures)))


def refusals(bench: Bench, names: Sequence[str] = ("one", "three", "all")) -> Row:
    """R8: in training, one refused step is passed over, three in a row go back, five end the run."""
    cases = {name: {"one": (2, 1), "three": (4, 3), "all": (4, 1000)}[name] for name in names}
    failures, log = [], bench.directory / "refusals.log"
    for name, (call, count) in ({"none": (1, 0)} | cases).items():
        argv = bench.argv(f"refused_{name}", "--num_steps=6", "--checkpoint.every=2")
        order = {"argv": argv, "rank": 1, "kind": "nan", "call": call, "count": count}
        ranks = bench.nursery.start("tests.rank_programs.trust:train", order, ranks=2, log=log)
        codes, output = ranks.wait(), ranks.output()
        refused = [step for step, own in _metrics(bench, name).items() if "optim/refused_steps" in own]
        if name == "one" and (codes != [0, 0] or refused != [2]):
            failures.append(f"{name}: exit codes {codes}, refused {refused}")
        if name == "three":
            differences = _differences(
                bench.directory / "refused_none", bench.directory / "refused_three", 6
            )[0]
            if codes != [0, 0] or "back to step" not in output or differences:
                failures.append(f"{name}: exit codes {codes}, {differences[:2]}: {output[-500:]}")
        if name == "all" and (codes != [1, 1] or "5 steps were refused" not in output):
            failures.append(f"{name}: exit codes {codes}: {output[-500:]}")
    figures = "after going back the run is bit for bit that of a run without the fault"
    what = "1 refused step is passed over, 3 in a row go back, 5 end the run"
    return row("R8", what, failures, count=len(cases), figures=figures)


def _metrics(bench: Bench, name: str) -> dict:
    return without_clocks(bench.directory / f"refused_{name}")


def spikes(*, steps: int, num_spikes: int, seed: int = 0) -> Row:
    """R9: gradient norms with heavy tails, on a slow drift, and spikes of 10 standard deviations of the
    logarithm, which is a Student t with 5 degrees of freedom, times 0.25."""
    rng = np.random.default_rng(seed)
    scale = 0.25
    logs = scale * rng.standard_t(5, steps) + np.sin(np.arange(steps) / 500)
    sigma = scale * math.sqrt(5 / 3)
    places = set(rng.choice(np.arange(300, steps), num_spikes, replace=False).tolist())
    guard, false, found = SpikeGuard(sigmas=8.0, window=256), 0, 0
    for step, log in enumerate(logs):
        norm = math.exp(math.sin(step / 500) + 10 * sigma if step in places else log)
        if norm > guard.limit():
            found, false = found + (step in places), false + (step not in places)
        else:
            guard.accept(norm)
    failures = ["spikes missed"] * (num_spikes - found) + ["too many clean steps refused"] * (
        false > steps * 1e-3
    )
    figures = (
        f"{false} of {steps - num_spikes:,} clean steps refused ({false / steps:.3%}) at spike_sigmas 8,"
        " window 256"
    )
    what = "spikes of 10 sigma among clean steps with heavy tails are refused"
    return row("R9", what, failures, count=num_spikes, figures=figures)
