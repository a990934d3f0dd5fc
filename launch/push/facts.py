"""What a run's own records say of a model: state.json of its checkpoint, metrics, attempts, evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.identity import model_version
from eval.run import REPORT_NAME
from launch.push.source import PushedModel
from megatron_sd.config.load import flat
from megatron_sd.errors import DataError
from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics
from megatron_sd.training.state.identity import Change, kind_of

_TRAINED = ("reward/mean", "reward/em", "reward/f1", "rollout/searches", "loss/policy")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """step: of the checkpoint. values: every key of the configuration that decided what was trained, plan
    included, by dotted name. commit: of the code; None where the run did not note it. changes: of the plan,
    in words. last: metrics of the step."""

    step: int
    config: Mapping[str, Any]
    contents: Mapping[str, str]
    corpus_version: str
    world_size: int
    values: Mapping[str, Any]
    commit: str | None
    changes: tuple[str, ...]
    last: Mapping[str, float]


def read_facts(model: PushedModel) -> Facts | None:
    """None for a directory that no run of ours wrote."""
    if model.checkpoint is None:
        return None
    state = json.loads((model.checkpoint / "state.json").read_text(encoding="utf-8"))
    run_dir, step = model.run_dir, state["step"]
    metrics = {}
    if run_dir is not None and (run_dir / METRICS_NAME).is_file():
        metrics = read_metrics(run_dir / METRICS_NAME).get(step, {})
    return Facts(
        step=step,
        config=state["config"],
        contents=state.get("contents", {}),
        corpus_version=state["corpus_version"],
        world_size=state["world_size"],
        values={key: value for key, value in flat(state["config"]).items() if kind_of(key) != "knob"},
        commit=None if run_dir is None else commit_of(run_dir),
        changes=tuple(
            f"from step {change['step']} on {Change(**change)}" for change in state.get("changes", ())
        ),
        last={name: metrics[name] for name in _TRAINED if name in metrics},
    )


def commit_of(run_dir: Path) -> str | None:
    """The commit that the newest attempt noted, with a word where there were local changes."""
    for path in sorted(run_dir.glob("attempts/*/git.txt"), reverse=True):
        first, *status = path.read_text(encoding="utf-8").splitlines() or [""]
        if re.fullmatch(r"[0-9a-f]{40}", first):
            changed = any(not line.startswith("##") for line in status)
            return f"{first} with local changes" if changed else first
    return None


def read_reports(model: PushedModel, given: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """report.json of evaluations of exactly these weights, by the names of their directories; and the
    evaluations beside the run that are of other weights. given: further directories.

    Raises DataError for a given directory that holds no report, or one of other weights.
    """
    beside = sorted(model.run_dir.glob(f"*/{REPORT_NAME}")) if model.run_dir else []
    paths = [*(Path(name) / REPORT_NAME for name in given), *beside]
    if not paths:
        return {}, []
    own = model_version(str(model.directory))
    reports, others = {}, []
    for path in dict.fromkeys(path.resolve() for path in paths):
        report = _read_report(path)
        if report.get("model_version") == own:
            reports[path.parent.name] = report
        else:
            others.append(path.parent.name)
    _refuse_given(others, given)
    return reports, others


def _read_report(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"--evaluations: {path} cannot be read ({error}); expected what `sd-search eval` wrote there"
        ) from error


def _refuse_given(others: Iterable[str], given: Sequence[str]) -> None:
    wrong = [name for name in given if Path(name).resolve().name in others]
    if wrong:
        raise DataError(
            f"--evaluations: {wrong[0]} is an evaluation of other weights (its model_version is another);"
            " expected one of the model that is pushed: evaluate it, or leave it out"
        )
