"""Trackio: local, or on a Space of the Hugging Face Hub, as TRACKIO_DIR and TRACKIO_SPACE_ID say."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from megatron_sd.observability.sinks.sink import TrackedRun


class TrackioSink:
    """A run of trackio. Names tell the runs of a project apart, so this one ends with an identity."""

    def __init__(self, tracked: TrackedRun, run_id: str | None) -> None:
        """run_id: the name of the run to go on with; None: a new one."""
        import trackio

        self.run_id = run_id or f"{tracked.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=tracked.log.project,
            name=self.run_id,
            resume="allow",
            config=tracked.parameters,
            embed=False,
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Wait until everything is stored."""
        self._run.finish()
