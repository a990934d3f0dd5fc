"""What a run does when steps go wrong: pass over them, go back to the last checkpoint, or stop. Decided
alike on every rank."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from megatron_sd.config import SafetyConfig
from megatron_sd.errors import RefusedStepError

MIN_NORMS = 16  # a scale taken from fewer would refuse ordinary steps
MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is sigma / 1.4826
MIN_SIGMA = 0.05  # of log norms: steps whose norms hardly differ are no reason to refuse 10 % more


class SpikeGuard:
    """The largest gradient norm that a step may have, from the norms of the steps before it.

    Norms spread over factors, not sums, so their logarithms are judged: a step is a spike when its log norm
    lies more than `sigmas` robust standard deviations (median and median absolute deviation of the window)
    above the median. Refused norms do not enter the window.
    """

    def __init__(self, *, sigmas: float, window: int):
        """sigmas: 0 refuses nothing. window: steps that are remembered."""
        self._sigmas = sigmas
        self._logs: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """Infinite while there is nothing to judge by."""
        if self._sigmas == 0.0 or len(self._logs) < MIN_NORMS:
            return math.inf
        logs = np.array(self._logs)
        median = float(np.median(logs))
        sigma = max(MAD_TO_SIGMA * float(np.median(np.abs(logs - median))), MIN_SIGMA)
        return math.exp(median + self._sigmas * sigma)

    def accept(self, norm: float) -> None:
        """A step of this norm was taken. A gradient of zero says nothing about the scale."""
        if norm > 0.0:
            self._logs.append(math.log(norm))

    def state(self) -> list[float]:
        """For the checkpoint."""
        return list(self._logs)

    def load_state(self, logs: list[float]) -> None:
        """What state() gave."""
        self._logs = deque(logs, maxlen=self._logs.maxlen)


class Stability:
    """Counts refused steps.

    A count falls back to 0 only when a step beyond the last refused one was taken. So a fault that came and
    went is healed by going back once, and one that comes again with the same questions ends the run instead
    of sending it back for ever.
    """

    def __init__(self, config: SafetyConfig):
        self._config = config
        self._spikes = SpikeGuard(sigmas=config.spike_sigmas, window=config.spike_window)
        self._count = 0
        self._last_refused = -1
        self._num_taken = 0
        self._last_error: RefusedStepError | None = None

    def norm_limit(self) -> float:
        """For the step about to be taken."""
        return self._spikes.limit()

    def taken(self, step: int, norm: float) -> None:
        """The optimiser took this step."""
        self._num_taken += 1
        self._spikes.accept(norm)
        if step > self._last_refused:
            self._count = 0

    def refused(self, step: int, error: RefusedStepError) -> bool:
        """True: go back to the last checkpoint. False: pass over the step. Raises RefusedStepError when it
        was one too many."""
        self._count += 1
        self._last_error = error
        self._last_refused = max(self._last_refused, step)
        if self._count >= self._config.stop_after_refusals:
            raise type(error)(
                f"{error}. {self._count} steps were refused without one in between that was new and sound "
                f"(safety.stop_after_refusals): {error.remedy}"
            ) from error
        return error.older_weights_help and self._count == self._config.roll_back_after_refusals

    def refuse_to_end(self) -> None:
        """The run would be over: raise the last refusal when this start has taken no step: it would look
        trained."""
        if self._last_error is not None and not self._num_taken:
            error = self._last_error
            raise type(error)(f"{error}. No step of this run was taken: {error.remedy}") from error

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"log_norms": self._spikes.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """What state() gave. The count of refusals belongs to the process, and stays."""
        self._spikes.load_state(state["log_norms"])
