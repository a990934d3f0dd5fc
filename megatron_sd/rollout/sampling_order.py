"""When a step's rollouts are sampled: within the step, or one step ahead, while the update before it runs.
carrying.py has the third order, in which they outlive steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_sd.distributed.collectives import share
from megatron_sd.distributed.world import World, use_device
from megatron_sd.records import Question, RolloutGroup
from megatron_sd.rollout.bank import RolloutBank
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.search.questions import MixedStream, QuestionStream

_log = logging.getLogger(__name__)

# this rank's groups of a step, in the first or a further round (collecting.py)
Sample = Callable[[int, int], list[RolloutGroup]]


def warn_of_dropped(state: Mapping[str, Any], step: int, change: str) -> None:
    """Say that rollouts which were carried are dropped, since the plan has changed."""
    if state.get("under_way"):
        _log.warning(
            "%s: %d groups under way at step %d are dropped; some of their questions are not trained on, some"
            " that were may come once more",
            *(change, len(state["under_way"]), step),
        )


class SamplingOrder(Protocol):
    """Hands out this rank's groups, step by step."""

    def take(self, step: int, round_number: int = 0) -> list[RolloutGroup]:
        """The groups of a step; those of further questions in a further round. Raises RolloutError when they
        could not be sampled."""
        ...

    def settle(self) -> None:
        """Wait until the engine is idle, so that it can take new weights. What failed is raised by the next
        `take`."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step`, between two steps, keeps of what is being sampled, as JSON values.
        Collective."""
        ...

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from such a checkpoint."""
        ...


@dataclass(frozen=True, kw_only=True)
class OwnShare:
    """Samples this rank's part of a step's questions. bank: where finished rollouts wait for a run that is
    started again; None: nowhere. question_batches: how many batches of questions are set apart for a step:
    what an earlier step used of its own changes nothing for later ones, so that a resumed run asks the
    same."""

    world: World
    questions: QuestionStream[Question] | MixedStream[Question]
    rollouter: Rollouter
    bank: RolloutBank | None
    question_batches: int = 1

    def __call__(self, step: int, round_number: int = 0) -> list[RolloutGroup]:
        """The groups of a step. Raises RolloutError when they could not be sampled."""
        mine = share(self.world, self.questions.batch(step * self.question_batches + round_number))
        if self.bank is None:
            return self.rollouter.run(mine, step=step)
        with contextlib.closing(self.bank.open(step, self.rollouter.policy_version)) as banked:
            return self.rollouter.run(mine, step=step, bank=banked)


class _Stateless:
    """What is sampled begins and ends within a step, or is sampled anew."""

    def state(self, step: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any], step: int) -> None:
        """Nothing; what another order had under way is dropped, with a warning."""
        warn_of_dropped(state, step, "rollout.max_lag was above 1")


class InStep(_Stateless):
    """On-policy: a step's rollouts are sampled when it begins, from the weights it will update."""

    def __init__(self, sample: Sample):
        self._sample = sample

    def take(self, step: int, round_number: int = 0) -> list[RolloutGroup]:
        """Sample now."""
        return self._sample(step, round_number)

    def settle(self) -> None:
        """Nothing runs between two steps."""


class OneAhead(_Stateless):
    """Rollouts of step n + 1 are sampled in a thread while step n is assembled and updated: from the
    weights of step n, so they are one optimiser step behind (the first step of a run, or of a resumed one,
    is not). Rollouts of a step that the run does not come to, because it goes back to a checkpoint, are
    dropped."""

    def __init__(self, sample: Sample, *, num_steps: int, device: torch.device):
        self._sample = sample
        self._num_steps = num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=use_device, initargs=(device,))
        self._ahead: Future[list[RolloutGroup]] | None = None
        self._step_ahead = -1

    def take(self, step: int, round_number: int = 0) -> list[RolloutGroup]:
        """Wait for the step's rollouts and begin the next step's. There is one round."""
        is_here = self._ahead is not None and self._step_ahead == step
        groups = (self._ahead if is_here else self._thread.submit(self._sample, step, 0)).result()
        more = step + 1 < self._num_steps
        self._ahead, self._step_ahead = (
            self._thread.submit(self._sample, step + 1, 0) if more else None,
            step + 1,
        )
        return groups

    def settle(self) -> None:
        """Wait for the next step's rollouts."""
        if self._ahead is not None:
            wait([self._ahead])
