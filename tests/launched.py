"""Programs of rank_programs/ on several real ranks: forked ones, or by DeepSpeed's launcher."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.local import free_port
from tests.nursery import run_ranks

LIMIT_S = 900


def rank_command(program: str, num_ranks: int, *arguments: str) -> list[str]:
    """A program of rank_programs/ on so many ranks; one needs no launcher."""
    if num_ranks == 1:
        return [sys.executable, "-m", program, *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks)]
    return [*launcher, "--master_port", str(free_port()), "--no_local_rank", "--module", program, *arguments]


def outcomes_on(num_ranks: int, orders: Mapping[str, dict], directory: Path) -> dict[str, list[Any]]:
    """By the order's name: what each rank made of it. All orders run in one start of forked ranks."""
    work = [{**fields, "output": str(directory / name)} for name, fields in orders.items()]
    run_ranks("tests.rank_programs.update_steps:run", json.dumps(work), ranks=num_ranks, limit_s=LIMIT_S)
    return {name: [torch.load(directory / f"{name}.{rank}") for rank in range(num_ranks)] for name in orders}


def assert_same_figures(found: dict, expected: dict) -> None:
    """Of two steps: the first's equal to rounding, the second's, after AdamW has stepped, nearly so."""
    for one, other, tolerance in zip(expected["history"], found["history"], (4e-6, 2e-5), strict=True):
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)
