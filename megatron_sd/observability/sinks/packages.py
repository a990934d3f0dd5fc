"""Whether the packages of the sinks are there; asked before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from megatron_sd.errors import ConfigError

OURS = ("tensorboard",)  # installed with the project; another sink's name is its package's, and our extra's


def check_packages(sinks: Sequence[str]) -> None:
    """Raise ConfigError for a service whose package is not installed."""
    for name in sinks:
        if name not in OURS and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.sinks: found {name}, but its package is not installed: pip install"
                f" 'megatron-sd[{name}]' (or {name} alone), or take it out of log.sinks"
            )
