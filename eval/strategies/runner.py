"""Runs the attempts of a prompted strategy concurrently; to an evaluation it looks like the rollouter of
the trained agent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from eval.strategies.attempt import Conversation, OutOfTokensError, Solve, Tools
from megatron_sd.errors import RetrievalError, RolloutError
from megatron_sd.observability.progress import SILENT, Task, Work
from megatron_sd.records import Question, Rollout, RolloutGroup, StopReason
from megatron_sd.rollout.engine import awake
from megatron_sd.rollout.sampling import rollout_seed


class Strategy(Protocol):
    """Answers questions. `Rollouter` is one: the trained search agent."""

    def run(self, questions: Sequence[Question], *, step: int, greedy: bool) -> list[RolloutGroup]:
        """`group_size` rollouts of every question, in question and index order; greedy: one."""
        ...


class PromptedStrategy:
    """A strategy that needs no training: `solve` over the engine and the retriever.

    seed: of the run; a rollout's noise follows from (seed, step, question id, index) as the rollouter's
    does. A rollout that failed for infrastructure reasons is kept as such; how many of them are too many is
    for the caller to say. work: where it is shown how far the rollouts are.
    """

    def __init__(self, solve: Solve, tools: Tools, *, seed: int, work: Work = SILENT):
        self._solve = solve
        self._work = work
        self._tools = tools
        self._seed = seed

    def run(self, questions: Sequence[Question], *, step: int, greedy: bool) -> list[RolloutGroup]:
        """See Strategy. Runs its own event loop, so it must not be called from a running one."""
        limits = self._tools.environment.limits
        num_samples = 1 if greedy else limits.group_size
        attempts = [
            Conversation(
                question,
                self._tools,
                session=f"step {step}, question {place} ({question.id}), rollout {index}",
                index=index,
                seed=rollout_seed(self._seed, step=step, question_id=question.id, index=index),
                temperature=0.0 if greedy else limits.temperature,
            )
            for place, question in enumerate(questions)
            for index in range(num_samples)
        ]
        with awake(self._tools.engine), self._work.on("rollouts", len(attempts), "ended") as task:
            rollouts = asyncio.run(self._run_all(attempts, task))
        return [
            RolloutGroup(
                question=question, rollouts=tuple(rollouts[place * num_samples : (place + 1) * num_samples])
            )
            for place, question in enumerate(questions)
        ]

    async def _run_all(self, attempts: Sequence[Conversation], task: Task) -> list[Rollout]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._attempt(attempt, task)) for attempt in attempts]
                ticking = tasks.create_task(task.keep_ticking())
                if running:
                    await asyncio.wait(running)
                ticking.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [one.result() for one in running]

    async def _attempt(self, attempt: Conversation, task: Task) -> Rollout:
        rollout = await self._rollout(attempt)
        task.add(done=1, tokens=sum(len(turn.completion_ids) for turn in rollout.turns))
        return rollout

    async def _rollout(self, attempt: Conversation) -> Rollout:
        try:
            answer = await self._solve(attempt)
        except OutOfTokensError:
            return attempt.rollout(StopReason.TOKEN_LIMIT)
        except RolloutError:
            return attempt.rollout(StopReason.ENGINE_FAILED)
        except RetrievalError:
            return attempt.rollout(StopReason.RETRIEVAL_FAILED)
        finally:
            attempt.close()
        answer = (answer or "").strip()
        return (
            attempt.rollout(StopReason.ANSWERED, answer) if answer else attempt.rollout(StopReason.NO_ACTION)
        )
