"""An engine that can be paused between turns, for rollouts that outlive a version of the weights."""

from __future__ import annotations

import asyncio

from megatron_sd.rollout.engine import Completion, GenerationRequest, InferenceEngine


class PausableEngine:
    """InferenceEngine over another one. It begins paused. All of it is called in one event loop; while it is
    paused the engine below is called by nobody here, and may take new weights. width: completions that the engine
    samples at one time; others wait here, so that a pause does not wait for them."""

    def __init__(self, engine: InferenceEngine, *, width: int):
        self._engine = engine
        self._room = asyncio.Semaphore(width)
        self._may_go = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._num_sampling = 0
        self._released: list[str] = []  # while it was paused

    @property
    def policy_version(self) -> int:
        """Of the weights that it samples from."""
        return self._engine.policy_version

    async def pause(self) -> None:
        """Hold new completions back, and wait for those that are being sampled."""
        if self._may_go.is_set():
            self._may_go.clear()
            await self._is_idle.wait()
            self._engine.sleep()

    async def go_on(self) -> None:
        """Sample what was held back."""
        if not self._may_go.is_set():
            self._engine.wake()
            for session in self._released:
                self._engine.release(session)
            self._released.clear()
            self._may_go.set()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion, when it is not paused. Raises RolloutError when nothing can be returned."""
        async with self._room:
            while not self._may_go.is_set():
                await self._may_go.wait()
            self._num_sampling += 1
            self._is_idle.clear()
            try:
                return await self._engine.generate(request)
            finally:
                self._num_sampling -= 1
                if not self._num_sampling:
                    self._is_idle.set()

    def release(self, session: str) -> None:
        """The rollout is over; the engine hears of it when it may be called."""
        if self._may_go.is_set():
            self._engine.release(session)
        else:
            self._released.append(session)

    def wake(self) -> None:
        """Nothing to do: see `go_on`."""

    def sleep(self) -> None:
        """Nothing to do: see `pause`."""

    def close(self) -> None:
        """Nothing to do: the engine below is not its own."""
