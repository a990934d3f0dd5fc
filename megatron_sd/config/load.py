"""From a command line to the configuration of a training run, and back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, OwnFunction) else value
