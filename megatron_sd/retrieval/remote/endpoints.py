"""Several servers of one corpus: which to ask next, and which to leave alone for a while. Pure but for the
clock handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BreakerSettings:
    """max_failures in a row open the breaker; after open_s one request may probe the endpoint."""

    max_failures: int
    open_s: float


class Endpoint:
    """One server: its requests in flight and its circuit breaker (closed, open, half open)."""

    def __init__(self, url: str, settings: BreakerSettings, clock: Callable[[], float]) -> None:
        self.url = url
        self.num_in_flight = 0
        self._settings = settings
        self._clock = clock
        self._num_failures = 0
        self._opened_at = 0.0
        self._is_probed = False

    @property
    def is_open(self) -> bool:
        """True after too many failures in a row, until a request succeeds."""
        return self._num_failures >= self._settings.max_failures

    def wait_s(self) -> float:
        """Seconds until it may be asked; 0 when it may be now."""
        if not self.is_open:
            return 0.0
        left_s = self._opened_at + self._settings.open_s - self._clock()
        return max(left_s, self._settings.open_s / 10) if self._is_probed else max(left_s, 0.0)

    def begin(self) -> None:
        """A request is sent."""
        self.num_in_flight += 1
        self._is_probed = self.is_open

    def end(self, *, succeeded: bool | None) -> None:
        """A request ended; None: abandoned, which says nothing about the endpoint."""
        self.num_in_flight -= 1
        self._is_probed = False
        if succeeded:
            self._num_failures = 0
        elif succeeded is not None:
            self._num_failures += 1
            self._opened_at = self._clock()


def choose(endpoints: Sequence[Endpoint], turn: int) -> Endpoint | None:
    """The endpoint that may be asked and has the fewest requests in flight, ties by turn; None when all are
    to be left alone."""
    places = [place for place, endpoint in enumerate(endpoints) if endpoint.wait_s() == 0]
    if not places:
        return None
    best = min(places, key=lambda place: (endpoints[place].num_in_flight, (place - turn) % len(endpoints)))
    return endpoints[best]
