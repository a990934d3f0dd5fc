"""MLflow, by its client: the module-level functions keep the active run by thread."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_sd.config.load import flat
from megatron_sd.observability.sinks.sink import TrackedRun

MOST_PARAMETERS, LONGEST_VALUE = 100, 500  # of one request, and in characters: what every MLflow server takes


class MlflowSink:
    """A run of the experiment log.project."""

    def __init__(self, tracked: TrackedRun, run_id: str | None) -> None:
        """run_id: of the run to go on with; None: a new one, with the configuration as its parameters."""
        import mlflow

        self._client = mlflow.MlflowClient(tracking_uri=tracked.log.mlflow_uri)
        self._metric = mlflow.entities.Metric
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(tracked.log.project)
        experiment = found.experiment_id if found else self._client.create_experiment(tracked.log.project)
        self.run_id = self._client.create_run(experiment, run_name=tracked.name).info.run_id
        parameters = [
            mlflow.entities.Param(key, str(value)[:LONGEST_VALUE])
            for key, value in flat(tracked.parameters).items()
        ]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self.run_id, params=parameters[start : start + MOST_PARAMETERS])

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """All scalars in one request."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """The run is over, until a later start goes on with it."""
        self._client.set_terminated(self.run_id)
