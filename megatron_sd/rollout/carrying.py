"""Rollouts that outlive a step: a slow search or a long rollout is carried into the next step, not waited for
(partial rollouts)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sd.config import RolloutConfig
from megatron_sd.distributed.collectives import check_stop, gather_objects, share
from megatron_sd.distributed.world import World, use_device
from megatron_sd.observability.progress import Task, Work
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.rollout.bank import RolloutBank
from megatron_sd.rollout.loop_thread import LoopThread
from megatron_sd.rollout.pausable import PausableEngine
from megatron_sd.rollout.rollouter import STOP_CHECK_S, Outcome, Rollouter
from megatron_sd.rollout.running import RunningRollout
from megatron_sd.rollout.sampling_order import warn_of_dropped
from megatron_sd.search.questions import MixedStream, QuestionStream

Place = tuple[int, int]  # of a group: its batch of questions, and where it stands in that

logger = logging.getLogger(__name__)
_UNSEEN = Task(0, time.monotonic)  # whole groups are shown, not their rollouts


@dataclass(eq=False)
class _Group:
    """A question's rollouts under way. work: ends with them."""

    question: Question
    rollouts: Sequence[RunningRollout]
    work: asyncio.Task[list[Outcome]]


class CarriedOver:
    """A SamplingOrder in which the questions of two steps are under way, and a step takes those that end first.

    Questions of batch b begin in step b - 1, and step b + max_lag - 1 waits for them: no turn that a step trains
    on is older than max_lag steps, and each question is trained on once. Rollouts pause between two turns while
    weights change; each turn knows its version. What a step took is given up when the step settles.

    bank: where rollouts under way wait for a run that goes on from a checkpoint; None: they are begun anew.
    """

    def __init__(
        self,
        *,
        world: World,
        questions: QuestionStream[Question] | MixedStream[Question],
        rollouter: Rollouter,
        engine: PausableEngine,
        bank: RolloutBank | None,
        num_steps: int,
        config: RolloutConfig,
        work: Work,
    ):
        """rollouter: over this engine."""
        self._world = world
        self._questions = questions
        self._rollouter = rollouter
        self._engine = engine
        self._bank = bank
        self._num_steps = num_steps
        self._patience = config.max_lag - 1  # steps that a group may be passed over
        self._own = share(world, range(config.questions_per_step))  # this rank's places in a batch
        self._batch_size = config.questions_per_step
        self._work = work
        self._next_batch = 0
        self._groups: dict[Place, _Group] = {}
        self._taken: dict[Place, _Group] = {}  # by the step at work
        self._some_ended = threading.Event()
        self._thread = LoopThread()
        self._thread.run(_use(world.device))

    def take(self, step: int, round_number: int = 0) -> list[RolloutGroup]:
        """The groups of this rank that end first, in the order of their questions, with those that may not wait
        any longer. There is one round."""
        self._put_back()
        while self._next_batch <= min(step + 1, self._num_steps - 1):
            self._begin([(self._next_batch, place) for place in self._own])
            self._next_batch += 1
        wanted = min(len(self._own), len(self._groups))
        due = [place for place in self._groups if place[0] + self._patience <= step]
        with self._work.on("groups", wanted, "ended") as task:
            self._thread.run(self._engine.go_on())
            while (found := self._found(due, wanted)) is None:
                check_stop(self._world)
                task.done = min(wanted, len(self._ended()))
                task.tick()
                self._some_ended.wait(STOP_CHECK_S)
                self._some_ended.clear()
        self._taken = {place: self._groups.pop(place) for place in found}
        outcomes = [group.work.result() for group in self._taken.values()]
        self._rollouter.refuse_many_failures([one for own in outcomes for one in own])
        return [
            RolloutGroup(question=group.question, rollouts=tuple(rollout for rollout, _ in own))
            for group, own in zip(self._taken.values(), outcomes)
        ]

    def settle(self) -> None:
        """Pause between turns, so that the engine can take new weights. What the step took is trained on."""
        self._thread.run(self._engine.pause())
        self._taken.clear()

    def state(self, step: int) -> dict[str, Any]:
        """Which groups of all ranks are under way, for a checkpoint of this step; the bank has their turns."""
        self._thread.run(self._engine.pause())
        self._put_back()
        if self._bank is not None:
            try:
                self._bank.carry(step, self._thread.run(self._written()), num_ranks=self._world.size)
            except OSError as error:  # a full disk, perhaps: the checkpoint that follows says so on all ranks
                logger.warning("rollouts under way are not kept, a later start begins them anew: %s", error)
        places = [place for own in gather_objects(self._world, list(self._groups)) for place in own]
        sizes = {"batch_size": self._batch_size, "num_ranks": self._world.size}
        return {"next_batch": self._next_batch, "under_way": sorted(places), **sizes}

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a checkpoint of this step, on however many ranks."""
        self._thread.run(self._engine.pause())
        self._thread.run(self._drop())
        size = self._batch_size
        if state.get("batch_size", size) != size:
            warn_of_dropped(
                state, step, f"rollout.questions_per_step was {state['batch_size']} and is now {size}"
            )
            state = {}
        places = [(batch, place) for batch, place in state.get("under_way", ())]
        self._next_batch = state.get("next_batch", step)
        parts = [share(self._world, places[n : n + size]) for n in range(0, len(places), size)]
        has_bank = self._bank is not None and "num_ranks" in state
        written = self._bank.carried(step, num_ranks=state["num_ranks"]) if has_bank else {}
        self._begin([place for part in parts for place in part], written)

    def _begin(self, places: Sequence[Place], written: Mapping[str, Mapping[str, Any]] = {}) -> None:
        self._thread.run(self._start(places, written))

    async def _start(self, places: Sequence[Place], written: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin groups, or go on with what was written of them, by the names of their rollouts."""
        batches = {batch: self._questions.batch(batch) for batch in {batch for batch, _ in places}}
        for batch, place in places:
            question = batches[batch][place]
            starts = self._rollouter.starts(question, step=batch, place=place)
            rollouts = [
                RunningRollout.resumed(start, written[start.session])
                if start.session in written
                else RunningRollout(start, start.prompt_ids)
                for start in starts
            ]
            work = asyncio.create_task(self._finish(rollouts))
            work.add_done_callback(lambda _: self._some_ended.set())
            self._groups[batch, place] = _Group(question, rollouts, work)

    async def _finish(self, rollouts: Sequence[RunningRollout]) -> list[Outcome]:
        """To their ends; an unexpected error of one ends the others, and is raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                ends = [tasks.create_task(self._rollouter.finish(one, _UNSEEN)) for one in rollouts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [end.result() for end in ends]

    def _ended(self) -> list[Place]:
        """Where groups have ended. An unexpected error of any rollout is raised at once."""
        ended = [place for place in sorted(self._groups) if self._groups[place].work.done()]
        for place in ended:
            self._groups[place].work.result()
        return ended

    def _found(self, due: Sequence[Place], wanted: int) -> list[Place] | None:
        """The places of the groups that make the step; None while too few have ended."""
        ended = self._ended()
        others = [place for place in ended if place not in due]
        if len(ended) < wanted or len(ended) - len(others) < len(due):
            return None
        return sorted([*due, *others[: max(0, wanted - len(due))]])

    def _put_back(self) -> None:
        """What a step took that has not settled."""
        self._groups |= self._taken
        self._taken = {}

    async def _written(self) -> list[dict[str, Any]]:
        """Every rollout under way, as the bank keeps it. A turn and its answer are whole here, since this runs
        between them."""
        running = [rollout for group in self._groups.values() for rollout in group.rollouts]
        return [{"name": rollout.start.session, **rollout.fields()} for rollout in running]

    async def _drop(self) -> None:
        """End everything that is under way."""
        tasks = [group.work for group in (*self._groups.values(), *self._taken.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._groups, self._taken = {}, {}


async def _use(device: torch.device) -> None:
    use_device(device)
