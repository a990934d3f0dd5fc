"""A run of the grid as one JSON file: written whole or not at all, and looked at before the run is
repeated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.grid.plan import OF_EVERY_RUN
from megatron_sd.durable.files import write_whole
from megatron_sd.errors import DataError


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a finished run leaves. digest: of what it was told (plan.digest); settings: what overrides the
    recipe.

    outcomes: by name (plan.OUTCOMES). curves: one value a step, by metric. ratios: what measuring steps
    found, by step. cost: CPU and wall seconds, rollouts. made_by: commit, machine, versions, digest of the
    start policy's weights.
    """

    arm: str
    start: str
    seed: int
    digest: str
    settings: Mapping[str, Any]
    outcomes: Mapping[str, float]
    curves: Mapping[str, list[float]]
    ratios: Mapping[str, Mapping[str, float]]
    cost: Mapping[str, float]
    made_by: Mapping[str, Any]


def write_record(path: Path, record: RunRecord) -> None:
    """Under its name only when it is complete and on disk."""
    write_whole(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_record(path: Path) -> RunRecord | None:
    """The record; None when the file is not there, or is only a part of one: its run is to be repeated."""
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
        complete = set(OF_EVERY_RUN) <= set(record.outcomes)
    except (OSError, ValueError, TypeError):
        return None
    return record if complete else None


def read_fitting(path: Path, digest: str) -> RunRecord | None:
    """read_record of a run whose configuration has this digest. Raises DataError for one of another
    configuration."""
    record = read_record(path)
    if record is not None and record.digest != digest:
        raise DataError(
            f"{path} was run with another configuration (digest {record.digest}, recipe and YAML now give"
            f" {digest}; its own settings are {dict(record.settings)}): restore them, choose another output,"
            " or remove the file to run it again"
        )
    return record
