"""A service beside the training: its network, or its failure, takes no second of a step and ends no run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping

from megatron_sd.observability.sinks.sink import Sink

MOST_WAITING = 1000  # records; more are lost, and counted
CLOSE_S = 20.0  # a run that ends, or was asked to stop, waits so long for a service

logger = logging.getLogger(__name__)


class Background:
    """Hands records to a service from a thread of its own. What the service refuses is warned of once,
    counted in log/lost_<name>, and stays in metrics.jsonl."""

    def __init__(
        self, name: str, sink: Sink | None, sent: Mapping[str, int], close_s: float = CLOSE_S
    ) -> None:
        """sink: None where it could not be opened: everything is lost to it. sent: the last step of each
        metric that it has; services append only, so that these steps are not written again."""
        self._name, self._sink, self._sent, self._close_s = name, sink, sent, close_s
        self._num_lost = 0
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """What the service does not have yet, soon."""
        new = {name: value for name, value in scalars.items() if step > self._sent.get(name, -1)}
        if not new:
            return
        if self._sink is None:
            self._num_lost += 1  # warned of where it was opened
        elif self._waiting.qsize() >= MOST_WAITING:
            self._lose(f"{MOST_WAITING} records are waiting for it")
        else:
            self._waiting.put((step, new))

    def lost_metrics(self) -> dict[str, float]:
        """How many records the service did not take since this start; empty as long as it took all."""
        return {f"log/lost_{self._name}": float(self._num_lost)} if self._num_lost else {}

    def close(self) -> None:
        """Wait for the service within bounds, and say what it did not take."""
        self._waiting.put(None)
        self._thread.join(self._close_s)
        num_waiting = self._waiting.qsize()
        if self._thread.is_alive():
            logger.warning("%s: still busy after %g s, left to itself", self._name, self._close_s)
        if self._num_lost or num_waiting:
            logger.warning(
                "%s: did not take %d records; metrics.jsonl has them",
                self._name,
                self._num_lost + num_waiting,
            )

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            try:
                self._sink.write(*record)
            except Exception as error:  # of whatever kind: the service is not ours
                self._lose(f"{type(error).__name__}: {error}")
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            logger.warning("%s: could not be closed: %s: %s", self._name, type(error).__name__, error)

    def _lose(self, reason: str) -> None:
        if self._num_lost == 0:
            logger.warning(
                "%s: a record was not taken (%s); training goes on, and log/lost_%s counts the others",
                self._name,
                reason,
                self._name,
            )
        self._num_lost += 1
