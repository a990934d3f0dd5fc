"""One process of a grid: reads names of runs from standard input, trains them one after another, and says
when each is done.

eval/grid/pool.py starts it as `python -m eval.grid.worker`, with one thread or one device of its own.
Imports are paid once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.grid.plan import GridConfig, Run
from eval.grid.records import RunRecord, write_record
from megatron_sd.config import Config
from megatron_sd.distributed.world import World, end_process, join_world
from megatron_sd.errors import MegatronSdError
from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics
from megatron_sd.records import RolloutGroup
from megatron_sd.search.questions import load_questions
from megatron_sd.search.rewards.reward import score
from megatron_sd.trainer import Trainer

ANSWER = "grid-worker:"  # lines of standard output that are meant for the pool; libraries may print others
ENTROPY = "rollout/entropy_nats"
CURVES = {"em": "reward/em", "hop_hits": "rollout/hop_hit_rate", "entropy": ENTROPY}
RATIOS = ("distill/alpha", "distill/grad_ratio", "distill/grad_ratio_no_spread", "distill/grad_cosine")
DIVERGENCE = "distill/divergence_nats"
# names the sampling noise of the evaluation; the same for all arms, never a training step's
EVALUATION_STEP = 1_000_000


def main() -> None:
    """Serve until standard input ends. A run that fails with an error of ours is reported, and the next one
    begins."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    world = join_world()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            train_run(Run(**order["run"]), order, world)
            said = "done"
        except (MegatronSdError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
        print(f"\n{ANSWER}{json.dumps(said)}", flush=True)
    end_process(0)


def train_run(run: Run, order: Mapping[str, Any], world: World) -> None:
    """Train a run in a directory that is gone afterwards, evaluate its last policy, and write its record to
    order["path"]."""
    # imports DeepSpeed, which must see the device that join_world chose
    from megatron_sd.building.trainer import build_trainer

    directory = Path(tempfile.mkdtemp(prefix="grid-"))
    try:
        config = run.config(order["recipe"], str(directory))
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer = build_trainer(config, world)
        trainer.train()
        cost = {
            "train_cpu_s": time.process_time() - cpu_started,
            "train_wall_s": time.perf_counter() - started,
        }
        outcomes = _held_out(trainer, config, order["num_eval_questions"])
        cost["cpu_s"] = time.process_time() - cpu_started
        steps = read_metrics(directory / METRICS_NAME)
        trainer.engine.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    cost["num_rollouts"] = float(len(steps) * config.rollout.questions_per_step * config.rollout.group_size)
    record = RunRecord(
        arm=run.arm,
        start=run.start,
        seed=run.seed,
        digest=run.digest,
        settings=run.overrides,
        outcomes=_rounded(outcomes | training_outcomes(steps)),
        curves={name: [round(m[key], 4) for m in steps.values() if key in m] for name, key in CURVES.items()},
        ratios={str(step): _rounded(own) for step, own in _measured(steps).items()},
        cost={name: round(value, 2) for name, value in cost.items()},
        made_by=provenance(Path(run.model)),
    )
    write_record(Path(order["path"]), record)


def _held_out(trainer: Trainer, config: Config, num_questions: int) -> dict[str, float]:
    """The last policy on held-out questions: as in training, and greedily."""
    questions = load_questions(config.data.eval, config.data.eval_split, num_questions)
    sampled, greedy = (
        score(trainer.rollouter.run(questions, step=EVALUATION_STEP, greedy=greedy), config.reward)
        for greedy in (False, True)
    )
    return {
        "eval_em": _mean(sampled, "em"),
        "eval_em_greedy": _mean(greedy, "em"),
        "eval_hop_hits": _mean(sampled, "hop_hit_rate"),
        "eval_searches": float(
            np.mean([len(rollout.queries) for group in sampled for rollout in group.usable])
        ),
    }


def training_outcomes(steps: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Success of the training rollouts, each sampled before its step's update: over all steps, and over the
    last quarter. Entropy of that quarter, unless the policy loss read nothing (policy_loss.weight 0)."""
    successes = [metrics["reward/em"] for metrics in steps.values()]
    last = successes[-max(1, len(successes) // 4) :]
    entropy = [m[ENTROPY] for m in steps.values() if ENTROPY in m][-len(last) :]
    known = {"train_entropy": np.mean(entropy)} if entropy else {}
    return {"train_em": np.mean(successes), "train_em_late": np.mean(last), **known}


def _measured(steps: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Of the steps that measured gradients: alpha, ratios, cosine and the divergence."""
    chosen = {step: metrics for step, metrics in steps.items() if "distill/grad_ratio" in metrics}
    names = (*RATIOS, DIVERGENCE)
    return {step: {name.split("/")[1]: m[name] for name in names if name in m} for step, m in chosen.items()}


def provenance(model: Path) -> dict[str, Any]:
    """What made a run: commit (with "+" when files differ from it), processor, versions, and the start
    policy's weights."""
    here = Path(__file__).resolve().parent
    commit = _git(here, "rev-parse", "--short=12", "HEAD")
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]
    return {
        "commit": commit + ("+" if changed else ""),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {platform.system()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "start_weights": weights,
    }


def _git(directory: Path, *words: str) -> str:
    try:
        return subprocess.run(
            ["git", *words], cwd=directory, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        return ""  # an installed package has no repository


def _mean(groups: Sequence[RolloutGroup], figure: str) -> float:
    values = [getattr(rollout.scores, figure) for group in groups for rollout in group.usable]
    return float(np.mean([value for value in values if value is not None] or [np.nan]))


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in values.items()}


def as_order(run: Run, config: GridConfig, path: Path) -> str:
    """A run as the line that this program reads; path: where its record goes."""
    fields = {"recipe": config.recipe, "num_eval_questions": config.num_eval_questions, "path": str(path)}
    return json.dumps({"run": dataclasses.asdict(run), **fields})


if __name__ == "__main__":
    main()
