"""From a grid's YAML to its runs: arms x start policies x seeds. What is wrong with it is found before the
first run."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sd.config import Config
from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError, DataError

_PLACES = ("run_dir", "seed", "log.", "model.path", "data.train", "data.eval", "retriever.corpus")
# Names of what a run measures: held-out success at the last step, sampled and greedy; success of the
# training rollouts, over
# all steps (early speed) and over the last quarter; searches a rollout; share of hops whose passage was
# found.
OF_EVERY_RUN = (
    "eval_em",
    "eval_em_greedy",
    "train_em",
    "train_em_late",
    "eval_hop_hits",
    "eval_searches",
)
OUTCOMES = (*OF_EVERY_RUN, "train_entropy")  # the last of runs with a policy loss alone


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Arms, start policies and seeds of one experiment, written down before its runs.

    recipe: the YAML of `sd-search train` that every run starts from; `common` and then the arm's own values
    override its dotted keys. Runs with the same start and seed see the same questions and the same sampling
    noise: they are a pair. outcomes: the first decides, the others are further ones (names: OUTCOMES).
    contrasts: (arm, against); empty: every arm against the baseline. Holm's adjustment is over the
    contrasts of one outcome. num_eval_questions: held-out questions that the last policy answers,
    group_size times each as in training and once greedily.
    """

    recipe: str
    output: str  # a directory; the same command goes on there
    arms: dict[str, dict[str, Any]]  # name -> dotted keys and their values
    starts: dict[str, str]  # name -> model directory
    seeds: tuple[int, ...]  # of the runs
    baseline: str  # an arm
    common: dict[str, Any] = field(default_factory=dict)  # dotted keys and their values, of all arms
    contrasts: tuple[tuple[str, str], ...] = ()
    outcomes: tuple[str, ...] = OUTCOMES[:3]
    num_eval_questions: int = 60
    num_workers: int = 1  # processes, one thread each; with devices, one of them each in turn
    devices: tuple[int, ...] = ()  # GPUs; empty: CPU cores
    only: tuple[str, ...] = ()  # arms to run now; empty: all
    table_only: bool = False  # run nothing; write table and picture of what is finished
    num_resamples: int = 10000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of the grid. overrides: dotted keys of the training configuration, over the recipe's;
    digest: of both together."""

    arm: str
    start: str
    seed: int
    model: str
    overrides: Mapping[str, Any]
    digest: str

    @property
    def name(self) -> str:
        """Of its JSON, without suffix."""
        return f"{self.arm}-{self.start}-{self.seed:03d}"

    def config(self, recipe: str, run_dir: str) -> Config:
        """The training configuration."""
        return _load(
            recipe, {**self.overrides, "model.path": self.model, "seed": self.seed, "run_dir": run_dir}
        )


def plan(config: GridConfig) -> list[Run]:
    """All runs, seeds slowest: whoever stops early has whole pairs. Raises ConfigError for anything
    unknown, DataError for a start policy that is not there."""
    _check_names(config)
    for name, path in config.starts.items():
        if not (Path(path) / "config.json").is_file():
            raise DataError(
                f"starts.{name}: {path} holds no config.json, expected the directory of a start policy"
            )
    arms = {arm: {**config.common, **own} for arm, own in config.arms.items()}
    for arm, overrides in arms.items():
        try:
            resolved = _load(config.recipe, overrides)
        except ConfigError as error:
            raise ConfigError(f"arm {arm!r}: {error}") from error
        _refuse_unlike(arm, resolved, config.outcomes)
    digests = {arm: digest(config.recipe, overrides) for arm, overrides in arms.items()}
    return [
        Run(arm=arm, start=start, seed=seed, model=path, overrides=overrides, digest=digests[arm])
        for seed in config.seeds
        for start, path in config.starts.items()
        for arm, overrides in arms.items()
    ]


def _refuse_unlike(arm: str, resolved: Config, outcomes: Sequence[str]) -> None:
    """Raise ConfigError for an arm that cannot be compared with others."""
    kept, weight = resolved.rollout.keep_groups, resolved.policy_loss.weight
    if kept != "all":
        raise ConfigError(
            f"arm {arm!r}: rollout.keep_groups: found {kept}, expected all: its steps would cost other"
            " numbers of rollouts than other arms', and a grid compares runs of equal rollouts"
        )
    if weight == 0.0 and "train_entropy" in outcomes:
        raise ConfigError(
            f"outcomes: found train_entropy with arm {arm!r}, whose policy_loss.weight is 0, expected another"
            " outcome: entropies are those that the policy loss reads"
        )


def contrasts_of(config: GridConfig) -> list[tuple[str, str]]:
    """(arm, against) pairs that are tested."""
    if config.contrasts:
        return [(arm, against) for arm, against in config.contrasts]
    return [(arm, config.baseline) for arm in config.arms if arm != config.baseline]


def digest(recipe: str, overrides: Mapping[str, Any]) -> str:
    """Of what an arm's runs were told; not of where they write, nor of where world and start policy lie.
    Defaults of the library are not in it: they belong to the commit, which every record names, and a new
    option must not make old runs void."""
    settings = _flat(yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))) | dict(overrides)
    told = {key: value for key, value in settings.items() if not key.startswith(_PLACES)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _check_names(config: GridConfig) -> None:
    for key in ("arms", "starts", "seeds", "outcomes"):
        if not getattr(config, key):
            raise ConfigError(f"{key}: found none, expected at least one")
    for key in ("num_workers", "num_eval_questions", "num_resamples"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}: found {getattr(config, key)}, expected 1 or more")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds: found {list(config.seeds)}, expected each once")
    arms = {
        "baseline": [config.baseline],
        "only": config.only,
        "contrasts": [arm for pair in config.contrasts for arm in pair],
    }
    for key, names in arms.items():
        _check_known(key, names, config.arms)
    _check_known("outcomes", config.outcomes, OUTCOMES)
    for name in (*config.arms, *config.starts):
        if not name.replace("_", "").isalnum():
            raise ConfigError(
                f"found the name {name!r}, expected letters, digits and underscores: it becomes a file name"
            )


def _check_known(key: str, found: Iterable[str], known: Iterable[str]) -> None:
    choices: Sequence[str] = list(known)
    for name in found:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
            raise ConfigError(f"{key}: unknown {name!r}; {hint}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _load(recipe: str, overrides: Mapping[str, Any]) -> Config:
    return load([f"--config={recipe}", *(f"--{key}={_word(value)}" for key, value in overrides.items())])


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
