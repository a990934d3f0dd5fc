"""Where the scalars of a run go beside metrics.jsonl: one interface for TensorBoard and for services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_sd.config import LogConfig


class Sink(Protocol):
    """Takes the scalars of one run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars of a step, by name; a step may be written several times, with other names."""

    def close(self) -> None:
        """Send what is left; nothing is written any more."""


class ServiceSink(Sink, Protocol):
    """A sink at a service, where the run has an identity. It may raise anything."""

    run_id: str  # by which a later start goes on with the same run


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a sink is told of the run."""

    run_dir: Path
    config_text: str  # YAML
    first_step: int  # that is going to be written
    log: LogConfig

    @property
    def name(self) -> str:
        """How people call it."""
        return self.log.run_name or self.run_dir.resolve().name

    @property
    def parameters(self) -> dict[str, Any]:
        """The resolved configuration."""
        return yaml.safe_load(self.config_text)
