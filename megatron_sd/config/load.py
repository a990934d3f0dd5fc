"""From a command line to the configuration of a training run, and back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_sd.config.checks import check
from megatron_sd.config.command_line import parse
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.config.run import Config


def load(argv: Sequence[str]) -> Config:
    """The training configuration from `--config FILE.yaml` and `--section.key value` overrides (later wins).

    Raises ConfigError naming the key at fault, what was found and what was expected.
    """
    config = parse(Config, argv, "sd-search train")
    check(config)
    return config


def dump(config: Any) -> str:
    """A resolved record of parameters, such as a Config, as YAML that `parse` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def plain(value: Any) -> Any:
    """Records, tuples and names of own functions as YAML and JSON have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, OwnFunction) else value
