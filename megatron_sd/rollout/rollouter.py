"""Runs the rollouts of a batch concurrently: think, search, read, ..., answer. No rollout waits for another
one's search."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megatron_sd.distributed.collectives import check_stop
from megatron_sd.distributed.world import World, lone_world
from megatron_sd.errors import RetrievalError, RolloutError, ToolError
from megatron_sd.observability.progress import SILENT, Task, Work
from megatron_sd.records import (
    SEARCH,
    Action,
    Hit,
    Question,
    Rollout,
    RolloutGroup,
    StopReason,
    TokenIds,
    Turn,
)
from megatron_sd.retrieval.retriever import Retriever
from megatron_sd.rollout.bank import BankedStep
from megatron_sd.rollout.engine import Completion, GenerationRequest, InferenceEngine, awake
from megatron_sd.rollout.sampling import rollout_seed
from megatron_sd.search.environment import Environment, Verdict
from megatron_sd.search.tools import Tool, ToolCall

STOP_CHECK_S = 0.1
NO_TOOLS: Mapping[str, Tool] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """What one rollout starts from."""

    session: str
    question_id: str
    index: int
    prompt_ids: TokenIds
    seed: int
    temperature: float


class Rollouter:
    """Samples groups of rollouts from an engine, a retriever and an environment.

    top_k: passages a search returns. seed: of the run; a rollout's tokens follow from (seed, step, question
    id, index) and the weights alone. tools: those beside search, by name. The limits are
    `environment.limits`. world: whose pulse moves with every turn, and whose stop request ends the rollouts
    at work (None: nobody's). work: where it is shown how far they are.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        retriever: Retriever,
        environment: Environment,
        *,
        top_k: int,
        seed: int,
        world: World | None = None,
        work: Work = SILENT,
        tools: Mapping[str, Tool] = NO_TOOLS,
    ):
        self._engine = engine
        self._retriever = retriever
        self._environment = environment
        self._top_k = top_k
        self._seed = seed
        self._world = world or lone_world()
        self._work = work
        self._tools = tools

    @property
    def policy_version(self) -> int:
        """Of the weights that the engine samples from."""
        return self._engine.policy_version

    def run(
        self,
        questions: Sequence[Question],
        *,
        step: int,
        greedy: bool = False,
        hindsight: Sequence[str] | None = None,
        bank: BankedStep | None = None,
    ) -> list[RolloutGroup]:
        """`group_size` rollouts of every question, in question and index order; greedy: one, since all
        would be equal.

        hindsight: one block per question, put into its prompt as the teacher sees it (None: no blocks).
        Returns when every rollout has ended; runs its own event loop, so it must not be called from a
        running one. bank: has rollouts that need not be sampled, and keeps those that end. Raises
        RolloutError when more than `max_failed_share` of the rollouts failed for infrastructure reasons,
        and StopRequested when this rank is asked to stop.
        """
        blocks = [""] * len(questions) if hindsight is None else list(hindsight)
        if len(blocks) != len(questions):
            raise ValueError(
                f"found {len(blocks)} hindsight blocks for {len(questions)} questions, expected one per"
                " question"
            )
        attempts = [
            self._attempts(question, block, step=step, place=place, greedy=greedy)
            for place, (question, block) in enumerate(zip(questions, blocks))
        ]
        if bank:
            bank.ask_for([(attempt.question_id, attempt.index) for group in attempts for attempt in group])
        flat = [attempt for group in attempts for attempt in group]
        with awake(self._engine), self._work.on("rollouts", len(flat), "ended") as task:
            outcomes = iter(asyncio.run(self._run_all(flat, bank, task)))
        results = [[next(outcomes) for _ in group] for group in attempts]
        self._refuse_many_failures([outcome for group in results for outcome in group])
        return [
            RolloutGroup(question=question, rollouts=tuple(rollout for rollout, _ in group))
            for question, group in zip(questions, results)
        ]

    def _attempts(
        self, question: Question, block: str, *, step: int, place: int, greedy: bool
    ) -> list[_Attempt]:
        limits = self._environment.limits
        prompt_ids = self._environment.prompt_ids(question.text, block)
        return [
            _Attempt(
                session=f"step {step}, question {place} ({question.id}), rollout {index}",
                question_id=question.id,
                index=index,
                prompt_ids=prompt_ids,
                seed=rollout_seed(self._seed, step=step, question_id=question.id, index=index),
                temperature=0.0 if greedy else limits.temperature,
            )
            for index in range(1 if greedy else limits.group_size)
        ]

    async def _run_all(
        self, attempts: Sequence[_Attempt], bank: BankedStep | None, task: Task
    ) -> list[tuple[Rollout, Exception | None]]:
        """One task per rollout, started in order; an unexpected error, and a request to stop, end them all
        and are raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._find_or_roll_out(attempt, bank, task)) for attempt in attempts
                ]
                beside = [tasks.create_task(self._watch_for_stop()), tasks.create_task(task.keep_ticking())]
                if running:
                    await asyncio.wait(running)
                for one in beside:
                    one.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [one.result() for one in running]

    async def _watch_for_stop(self) -> None:
        while True:
            check_stop(self._world)
            await asyncio.sleep(STOP_CHECK_S)

    async def _find_or_roll_out(
        self, attempt: _Attempt, bank: BankedStep | None, task: Task
    ) -> tuple[Rollout, Exception | None]:
        rollout, error = bank.find(attempt.question_id, attempt.index) if bank else None, None
        if rollout is None:
            rollout, error = await self._roll_out(attempt, task)
            if bank and error is None:
                bank.keep(rollout)
        task.add(done=1)
        return rollout, error

    async def _roll_out(self, attempt: _Attempt, task: Task) -> tuple[Rollout, Exception | None]:
        """One rollout to its end, and the error when it failed for infrastructure reasons."""
        episode = _Episode(attempt, attempt.prompt_ids)
        try:
            while episode.stop is None:
                await self._take_turn(episode, task)
        except RolloutError as error:
            return episode.rollout(StopReason.ENGINE_FAILED), error
        except RetrievalError as error:
            return episode.rollout(StopReason.RETRIEVAL_FAILED), error
        except ToolError as error:
            return episode.rollout(StopReason.TOOL_FAILED), error
        finally:
            self._engine.release(attempt.session)
        return episode.rollout(episode.stop), None

    async def _take_turn(self, episode: _Episode, task: Task) -> None:
        """Sample a completion, judge it, and append what the environment answers."""
        environment = self._environment
        budget = environment.turn_budget(len(episode.ids))
        if budget == 0:
            episode.stop = StopReason.TOKEN_LIMIT
            return
        completion = await self._complete(episode, budget)
        self._world.pulse.move()
        task.add(tokens=len(completion.ids))
        verdict = environment.judge(
            completion.ids,
            turn=sum(turn.attempt == episode.number for turn in episode.turns),
            truncated=completion.finish == "length",
            attempt=episode.number,
            called=Counter(turn.action.tool for turn in episode.turns if turn.action is not None),
            num_faults=episode.num_faults,
        )
        episode.act(
            completion,
            verdict,
            well_formed=environment.is_well_formed(completion.ids, turn=len(episode.turns)),
            note=environment.note(completion.ids),
        )
        if verdict.stop is not None:
            return
        hits: tuple[Hit, ...] = ()
        observation = verdict.observation_ids
        if verdict.action is not None:
            hits, observation = await self._serve(verdict.action, episode)
        if environment.turn_budget(len(episode.ids) + len(observation)) == 0:
            observation, episode.stop = (), StopReason.TOKEN_LIMIT
        episode.observe(hits, observation)

    async def _serve(self, action: Action, episode: _Episode) -> tuple[tuple[Hit, ...], TokenIds]:
        """What a search found, and what the policy is shown."""
        if action.tool == SEARCH:
            (hits,) = await self._retriever.search([action.text], self._top_k)
            return hits, self._environment.observation_ids(hits)
        call = ToolCall(question_id=episode.attempt.question_id, turns=tuple(episode.turns))
        return (), self._environment.result_ids(await self._tools[action.tool].answer(action.text, call))

    async def _complete(self, episode: _Episode, budget: int) -> Completion:
        attempt = episode.attempt
        request = GenerationRequest(
            session=attempt.session,
            prompt_ids=episode.ids,
            max_new_tokens=budget,
            temperature=attempt.temperature,
            seed=attempt.seed,
            stop=self._environment.protocol.stop_strings,
        )
        completion = await self._engine.generate(request)
        if not completion.ids:
            raise RolloutError(
                f"the engine returned no token for {attempt.session}, expected 1 to {budget}; see its log"
            )
        return completion

    def _refuse_many_failures(self, outcomes: Sequence[tuple[Rollout, Exception | None]]) -> None:
        failures = [(rollout, error) for rollout, error in outcomes if error is not None]
        limit = self._environment.limits.max_failed_share
        if len(failures) <= limit * len(outcomes):
            return
        counts = Counter(rollout.stop_reason.value for rollout, _ in failures)
        raise RolloutError(
            f"{len(failures)} of {len(outcomes)} rollouts failed ({dict(counts)}), "
            f"expected at most {limit:.0%} (rollout.max_failed_share); the first cause: {failures[0][1]}"
        ) from failures[0][1]


@dataclass
class _Episode:
    """A rollout while it runs. ids: everything the engine has to see before the next turn."""

    attempt: _Attempt
    ids: TokenIds
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    stop: StopReason | None = None
    number: int = 0  # of the attempt at work
    num_faults: int = 0  # native calls that could not be read

    def act(self, completion: Completion, verdict: Verdict, *, well_formed: bool, note: str) -> None:
        """Append what the policy sampled."""
        self.turns.append(
            Turn(
                completion_ids=completion.ids,
                completion_logprobs=completion.logprobs,
                action=verdict.action,
                policy_version=completion.policy_version,
                well_formed=well_formed,
                note=note,
                attempt=self.number,
                answer=verdict.answer,
            )
        )
        self.number += verdict.ends_attempt
        self.num_faults += verdict.is_fault
        self.ids = (*self.ids, *completion.ids)
        self.answer, self.stop = verdict.answer, verdict.stop

    def observe(self, hits: tuple[Hit, ...], observation_ids: TokenIds) -> None:
        """Append what the environment answered to the last turn."""
        self.turns[-1] = replace(self.turns[-1], hits=hits, observation_ids=observation_ids)
        self.ids = (*self.ids, *observation_ids)

    def rollout(self, stop_reason: StopReason) -> Rollout:
        """The record of what happened so far."""
        return Rollout(
            question_id=self.attempt.question_id,
            index=self.attempt.index,
            prompt_ids=self.attempt.prompt_ids,
            turns=tuple(self.turns),
            stop_reason=stop_reason,
            answer=self.answer,
        )
