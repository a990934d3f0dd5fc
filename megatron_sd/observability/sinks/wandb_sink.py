"""Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from megatron_sd.observability.sinks.sink import TrackedRun

STEP = "step"  # wandb's own step cannot be written twice, this one can: train and eval scalars of one step


class WandbSink:
    """A run of wandb; its files lie in run_dir/wandb."""

    def __init__(self, tracked: TrackedRun, run_id: str | None) -> None:
        """run_id: of the run to go on with; None: a new one."""
        import wandb

        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=tracked.log.project,
            name=tracked.name,
            id=self.run_id,
            resume="allow",
            dir=str(tracked.run_dir),
            mode=tracked.log.wandb_mode,
            config=tracked.parameters,
            allow_val_change=True,  # the plan may have been changed on purpose
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row of its history."""
        self._run.log({STEP: step, **scalars})

    def close(self) -> None:
        """Wait until everything is sent, or on disk when offline."""
        self._run.finish()
