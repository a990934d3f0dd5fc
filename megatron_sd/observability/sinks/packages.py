"""Whether the packages of the sinks are there; asked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sd.machine import require_extra

OURS = ("tensorboard",)  # installed with the project; another sink's name is its package's, and our extra's


def check_packages(sinks: Sequence[str]) -> None:
    """Raise ConfigError for a service whose package is not installed."""
    for name in sinks:
        if name not in OURS:
            require_extra(name, name, "log.sinks")
