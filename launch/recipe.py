"""`sd-search recipe NAME`: a pretrained model warms up and trains: sample, select, sft, gate, train, in one
command.

    sd-search recipe real-0.5b --model.path DIR --questions FILE --retriever.corpus DIR --output runs/real

A recipe is a YAML file: a section for each stage, with the keys of its program, and beside them what stages
have in common (model, retriever, protocol, ...), which a stage's own section overrides; `base` names a
recipe that it changes. In texts {output} is the recipe's directory and {sft_model} the model that sft left.
Any key may be given on the command line, a stage's as --sft.num_epochs 3.

    output/stages/sft.yaml    what a stage was run with
    output/stages/sft.done    it finished: it is passed over until it, or a stage before it, is asked for otherwise

A stage that was killed goes on, as its program does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from data_prep.episodes import select
from eval.gate.command import REPORT_NAME as GATE_REPORT
from eval.gate.command import GateConfig
from eval.sample import SampleConfig
from launch import local
from megatron_sd.config import Config
from megatron_sd.config.checks import check
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.durable.directories import committed
from megatron_sd.durable.run_lock import hold
from megatron_sd.errors import ConfigError, DataError, MegatronSdError
from megatron_sd.sft_config import SftConfig, check_sft

Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What is the recipe's own. gate_may_be_closed: train even from a model that does not read blocks
    (claim nothing of it)."""

    output: str  # a directory for all stages; the same command goes on there
    num_ranks: int = 1  # processes of each stage that can have several
    gate_may_be_closed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A program: the record of its parameters, and how it is run with a YAML file of them."""

    record: type
    run: Callable[[RecipeConfig, Path], None]


def _sample(own: RecipeConfig, path: Path) -> None:
    local.start_ranks(own.num_ranks, [f"--config={path}"], program="eval.sample")


def _select(own: RecipeConfig, path: Path) -> None:
    select.main([f"--config={path}"])


def _sft(own: RecipeConfig, path: Path) -> None:
    local.sft([f"--num-ranks={own.num_ranks}", f"--config={path}"])


def _gate(own: RecipeConfig, path: Path) -> None:
    """Raises MegatronSdError when the gate is closed, unless it may be."""
    report = Path(yaml.safe_load(path.read_text(encoding="utf-8"))["output"]) / GATE_REPORT
    report.unlink(missing_ok=True)
    try:
        local.start_ranks(own.num_ranks, [f"--config={path}"], program="eval.gate.command")
    except MegatronSdError:
        is_closed = report.exists() and json.loads(report.read_text(encoding="utf-8"))["gate"] == "closed"
        if not (is_closed and own.gate_may_be_closed):
            raise
        say(
            "the gate is closed, and may be (gate_may_be_closed): what follows is no evidence for"
            " self-distillation"
        )


def _train(own: RecipeConfig, path: Path) -> None:
    local.main([f"--num-ranks={own.num_ranks}", f"--config={path}"])


STAGES: Mapping[str, Stage] = {
    "sample": Stage(record=SampleConfig, run=_sample),
    "select": Stage(record=select.SelectConfig, run=_select),
    "sft": Stage(record=SftConfig, run=_sft),
    "gate": Stage(record=GateConfig, run=_gate),
    "train": Stage(record=Config, run=_train),
}


CHECKS: Mapping[type, Callable[[Any], None]] = {Config: check, SftConfig: check_sft}  # others: check_ranges


def main(argv: Sequence[str]) -> None:
    """The command line of `recipe`."""
    own, stages = read_recipe(argv)
    output = Path(own.output)
    with hold(output):
        (output / "stages").mkdir(exist_ok=True)
        digest = ""
        for number, (name, tree) in enumerate(stages.items(), start=1):
            path = output / "stages" / f"{name}.yaml"
            text = yaml.safe_dump(filled(tree, own, stages), sort_keys=False, allow_unicode=True)
            digest = hashlib.sha256(f"{digest}\n{text}".encode()).hexdigest()
            done = path.with_suffix(".done")
            title = f"{number}/{len(stages)}  {name}"
            if done.exists() and done.read_text(encoding="utf-8") == digest:
                say(f"{title}: finished before")
                continue
            say(title)
            done.unlink(missing_ok=True)
            path.write_text(text, encoding="utf-8")
            STAGES[name].run(own, path)
            done.write_text(digest, encoding="utf-8")


def say(line: str) -> None:
    """One line that stands out between what the stages say."""
    print(f"\n=== {line}", flush=True)


def read_recipe(argv: Sequence[str]) -> tuple[RecipeConfig, dict[str, Tree]]:
    """The recipe's own keys, and the parameters of each of its stages, checked before any is run. Raises
    ConfigError."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"recipe: found no name, expected one of {', '.join(_known())}, or a YAML file")
    tree = _read(argv[0])
    for key, value in overrides(argv[1:]):
        _put(tree, key, value)
    names = [field.name for field in dataclasses.fields(RecipeConfig)]
    own = parse(
        RecipeConfig, [f"--{name}={tree[name]}" for name in names if name in tree], "sd-search recipe"
    )
    if own.num_ranks < 1:
        raise ConfigError(f"num_ranks: found {own.num_ranks}, expected 1 or more")
    common = {key: value for key, value in tree.items() if key not in STAGES and key not in names}
    _refuse_strangers(common)
    stages = {name: _of_stage(name, common, tree[name] or {}) for name in STAGES if name in tree}
    for name, wanted in stages.items():
        _check(name, wanted)
    return own, stages


def overrides(argv: Sequence[str]) -> list[tuple[str, Any]]:
    """(dotted key, YAML value) of `--key value`, `--key=value` and `--switch`; --num-ranks is num_ranks.
    Raises ConfigError.

    >>> overrides(["--sft.num_epochs", "3", "--model.path=x", "--gate_may_be_closed"])
    [('sft.num_epochs', 3), ('model.path', 'x'), ('gate_may_be_closed', True)]
    """
    found: list[tuple[str, Any]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"found {word!r} on the command line, expected --key value")
        key, is_joined, value = word[2:].partition("=")
        if not is_joined:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        found.append(("num_ranks" if key == "num-ranks" else key, _value(key, value)))
    return found


def _value(key: str, text: str) -> Any:
    """As YAML reads it, and 1e-5 as the number that everybody means."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: found {text!r}, expected a YAML value") from error
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def filled(tree: Any, own: RecipeConfig, stages: Mapping[str, Tree]) -> Any:
    """The tree with {output} and {sft_model} in its texts. Raises DataError when there is no such model
    yet."""
    if isinstance(tree, dict):
        return {key: filled(value, own, stages) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, own, stages) for value in tree]
    if not isinstance(tree, str):
        return tree
    text = tree.replace("{output}", own.output)
    return text.replace("{sft_model}", str(_sft_model(own, stages))) if "{sft_model}" in text else text


def _sft_model(own: RecipeConfig, stages: Mapping[str, Tree]) -> Path:
    if "sft" not in stages:
        raise ConfigError(
            "{sft_model} stands in a recipe without a stage sft, expected a model's directory in its place"
        )
    root = Path(stages["sft"]["run_dir"].replace("{output}", own.output)) / "checkpoints"
    found = committed(root) if root.is_dir() else []
    if not found:
        raise DataError(f"{root} holds no checkpoint, expected the one that the stage sft leaves")
    return found[0] / "model"


def _known() -> list[str]:
    return sorted(path.stem for path in (Path(str(files("launch"))) / "configs" / "recipes").glob("*.yaml"))


def _read(name: str) -> Tree:
    path = (
        Path(name)
        if name.endswith((".yaml", ".yml"))
        else Path(str(files("launch"))) / "configs" / "recipes" / f"{name}.yaml"
    )
    if not path.is_file():
        raise ConfigError(f"recipe: found {name!r}, expected one of {', '.join(_known())}, or a YAML file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no YAML ({error}); mend the file") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: found a {type(tree).__name__}, expected a mapping with sections {', '.join(STAGES)}"
        )
    base = tree.pop("base", None)
    return tree if base is None else merged(_read(str(base)), tree)


def _put(tree: Tree, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"--{key}: {section} is {tree[section]!r}, expected a section")
        tree = tree[section]
    tree[last] = value


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(STAGES[name].record)}


def _refuse_strangers(common: Tree) -> None:
    known = set().union(*map(_fields, STAGES))
    for key in common.keys() - known:
        near = difflib.get_close_matches(
            key, [*known, *STAGES, "output", "num_ranks", "gate_may_be_closed"], n=1
        )
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"expected a stage ({', '.join(STAGES)}) or a key that a stage has"
        )
        raise ConfigError(f"{key}: unknown key of a recipe; {hint}")


def _of_stage(name: str, common: Tree, section: Tree) -> Tree:
    if not isinstance(section, dict):
        raise ConfigError(f"{name}: found {section!r}, expected a section")
    return merged({key: value for key, value in common.items() if key in _fields(name)}, section)


def merged(below: Tree, above: Tree) -> Tree:
    """Both trees in one; where they meet, sections are merged and other values are those of `above`."""
    both = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, dict) and isinstance(below.get(key), dict)
        both[key] = merged(below[key], value) if is_section else value
    return both


def _check(name: str, tree: Tree) -> None:
    """Raise ConfigError, with the stage's name first, for parameters that its program would not take."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(tree, file, sort_keys=False, allow_unicode=True)
        file.flush()
        try:
            found = parse(STAGES[name].record, [f"--config={file.name}"], f"sd-search {name}")
            CHECKS.get(type(found), check_ranges)(found)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
