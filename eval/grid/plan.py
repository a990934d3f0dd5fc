"""From a grid's YAML to its runs: arms x start policies x seeds. What is wrong with it is found before the first run."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sd.config import Config, load
from megatron_sd.errors import ConfigError, DataError

# Names of what a run measures: held-out success at the last step, sampled and greedy; success of the training rollouts, over
# all steps (early speed) and over the last quarter; searches a rollout; share of hops whose passage was found.
OUTCOMES = ("eval_em", "eval_em_greedy", "train_em", "train_em_late", "eval_hop_hits", "eval_searches", "train_entropy")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Arms, start policies and seeds of one experiment, written down before its runs.

    recipe: the YAML of `sd-search train` that every run starts from; `common` and then the arm's own values override its dotted
    keys. Runs with the same start and seed see the same questions and the same sampling noise: they are a pair.
    outcomes: the first decides, the others are further ones (names: OUTCOMES). contrasts: (arm, against); empty: every arm
    against the baseline. Holm's adjustment is over the contrasts of one outcome.
    num_eval_questions: held-out questions that the last policy answers, group_size times each as in training and once greedily.
    """

    recipe: str
    output: str
    arms: dict[str, dict[str, Any]]
    starts: dict[str, str]  # name -> model directory
    seeds: tuple[int, ...]
    baseline: str
    common: dict[str, Any] = field(default_factory=dict)
    contrasts: tuple[tuple[str, str], ...] = ()
    outcomes: tuple[str, ...] = OUTCOMES[:3]
    num_eval_questions: int = 60
    num_workers: int = 1  # processes, one thread each; with devices, one of them each in turn
    devices: tuple[int, ...] = ()  # GPUs; empty: CPU cores
    only: tuple[str, ...] = ()  # arms to run now; empty: all
    num_resamples: int = 10000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of the grid. overrides: dotted keys of the training configuration, over the recipe's."""

    arm: str
    start: str
    seed: int
    model: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its JSON, without suffix."""
        return f"{self.arm}-{self.start}-{self.seed:03d}"

    def config(self, recipe: str, run_dir: str) -> Config:
        """The training configuration. Raises ConfigError naming the key at fault, and the nearest."""
        own = {**self.overrides, "model.path": self.model, "seed": self.seed, "run_dir": run_dir}
        return load([f"--config={recipe}", *(f"--{key}={_word(value)}" for key, value in own.items())])


def plan(config: GridConfig) -> list[Run]:
    """All runs, seeds slowest: whoever stops early has whole pairs. Raises ConfigError for anything unknown, DataError for
    a start policy that is not there."""
    _check_names(config)
    for name, path in config.starts.items():
        if not (Path(path) / "config.json").is_file():
            raise DataError(f"starts.{name}: {path} holds no config.json, expected the directory of a start policy")
    runs = [
        Run(arm=arm, start=start, seed=seed, model=path, overrides={**config.common, **(own or {})})
        for seed in config.seeds
        for start, path in config.starts.items()
        for arm, own in config.arms.items()
    ]
    for run in {run.arm: run for run in runs}.values():
        try:
            run.config(config.recipe, "unused")
        except ConfigError as error:
            raise ConfigError(f"arm {run.arm!r}: {error}") from error
    return runs


def contrasts_of(config: GridConfig) -> list[tuple[str, str]]:
    """(arm, against) pairs that are tested."""
    if config.contrasts:
        return [(arm, against) for arm, against in config.contrasts]
    return [(arm, config.baseline) for arm in config.arms if arm != config.baseline]


def digest(config: Config) -> str:
    """Of everything that an arm's runs have in common; not of where they write, nor of where world and start policy lie."""
    tree = asdict(config)
    del tree["run_dir"], tree["log"], tree["seed"], tree["model"]["path"]
    del tree["data"]["train"], tree["data"]["eval"], tree["retriever"]["corpus"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _check_names(config: GridConfig) -> None:
    for key in ("arms", "starts", "seeds", "outcomes"):
        if not getattr(config, key):
            raise ConfigError(f"{key}: found none, expected at least one")
    for key in ("num_workers", "num_eval_questions", "num_resamples"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}: found {getattr(config, key)}, expected 1 or more")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds: found {list(config.seeds)}, expected each once")
    arms = {"baseline": [config.baseline], "only": config.only, "contrasts": [arm for pair in config.contrasts for arm in pair]}
    for key, names in arms.items():
        _check_known(key, names, config.arms)
    _check_known("outcomes", config.outcomes, OUTCOMES)
    for name in (*config.arms, *config.starts):
        if not name.replace("_", "").isalnum():
            raise ConfigError(f"found the name {name!r}, expected letters, digits and underscores: it becomes a file name")


def _check_known(key: str, found: Iterable[str], known: Iterable[str]) -> None:
    choices: Sequence[str] = list(known)
    for name in found:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
            raise ConfigError(f"{key}: unknown {name!r}; {hint}")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
