"""The sinks by name, and how a start of a run opens them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping

from megatron_sd.durable.files import write_whole
from megatron_sd.errors import ConfigError
from megatron_sd.observability.sinks.background import Background
from megatron_sd.observability.sinks.mlflow_sink import MlflowSink
from megatron_sd.observability.sinks.sink import ServiceSink, Sink, TrackedRun
from megatron_sd.observability.sinks.tensorboard import TENSORBOARD_NAME, TensorBoard
from megatron_sd.observability.sinks.trackio_sink import TrackioSink
from megatron_sd.observability.sinks.wandb_sink import WandbSink

SERVICES_NAME = "services.json"
# by name, which is also that of the package and of our extra
SERVICES: dict[str, Callable[[TrackedRun, str | None], ServiceSink]] = {
    "wandb": WandbSink,
    "trackio": TrackioSink,
    "mlflow": MlflowSink,
}
SINKS = ("tensorboard", *SERVICES)

logger = logging.getLogger(__name__)


def open_sinks(tracked: TrackedRun, sent: Mapping[str, int]) -> list[Sink]:
    """The sinks of log.sinks, in its order. sent: the last step that each metric was recorded at before.

    Raises ConfigError for a service that cannot be opened when the run begins there. When it goes on, the
    service is warned of and passed over: a job that starts again by night needs none.
    """
    path = tracked.run_dir / SERVICES_NAME
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sinks: list[Sink] = []
    for name in tracked.log.sinks:
        if name == "tensorboard":
            sinks.append(TensorBoard(tracked.run_dir / TENSORBOARD_NAME, first_step=tracked.first_step))
            continue
        service = _open_service(name, tracked, known.get(name))
        sinks.append(Background(name, service, sent if name in known else {}))
        if service is not None and known.get(name) != service.run_id:
            known[name] = service.run_id
            write_whole(path, json.dumps(known, indent=1) + "\n")
    return sinks


def _open_service(name: str, tracked: TrackedRun, run_id: str | None) -> ServiceSink | None:
    try:
        return SERVICES[name](tracked, run_id)
    except Exception as error:  # of whatever kind: the service is not ours
        found = f"log.sinks: {name} could not be opened ({type(error).__name__}: {error})"
        if run_id is None:
            raise ConfigError(
                f"{found}; expected a service that takes the run: log in to it, use it offline"
                " (docs/tracking.md), or take it out of log.sinks"
            ) from error
        logger.warning("%s; training goes on without it, and log/lost_%s counts", found, name)
        return None
