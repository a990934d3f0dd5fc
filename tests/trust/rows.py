"""What a trust test reports: one row of docs/trust.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from data_prep.world.world import WorldConfig
from launch.programs import make_world
from tests.nursery import Nursery
from tests.whole_runs.test_training import arguments

SMALL = (
    "--rollout.questions_per_step=2",
    "--rollout.group_size=2",
    "--rollout.max_search_turns=1",
    "--rollout.max_turn_tokens=16",
    "--log.transcripts_every=0",
    "--safety.max_idle_attempts=0",
    "--distill.measure_every=0",
    "--distill.alpha.mode=fixed",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """passed of count trials did what was expected; figures: what else was measured; failures: what the
    others did."""

    test: str
    what: str
    count: int
    passed: int
    figures: str = ""
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where trust tests run: an empty directory, a synthetic world, forked ranks, and chance."""

    directory: Path
    world: Path
    nursery: Nursery
    random: Random

    def argv(self, name: str, *overrides: str) -> list[str]:
        """Of a small run with real rollouts, in the directory of this name."""
        return arguments(self.world, self.directory / name, *SMALL, *overrides)


def make_small_world(directory: Path) -> Path:
    """A synthetic world to train in."""
    make_world(WorldConfig(output=str(directory), num_train_questions=60, num_eval_questions=20))
    return directory


def row(test: str, what: str, failures: list[str], *, count: int, figures: str = "") -> Row:
    """failures: one entry a failed trial."""
    return Row(
        test=test,
        what=what,
        count=count,
        passed=count - len(failures),
        figures=figures,
        failures=tuple(failures),
    )
