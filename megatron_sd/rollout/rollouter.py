"""Runs the rollouts of a batch concurrently: think, search, read, ..., answer. No rollout waits for another
one's search."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from megatron_sd.algorithm.evidence import AskedTurn
from megatron_sd.distributed.collectives import check_stop
from megatron_sd.distributed.world import World, lone_world
from megatron_sd.errors import RetrievalError, RolloutError, ToolError
from megatron_sd.observability.progress import SILENT, Task, Work
from megatron_sd.records import SEARCH, Action, Hit, Question, Rollout, RolloutGroup, StopReason, TokenIds
from megatron_sd.retrieval.retriever import Retriever
from megatron_sd.rollout.bank import BankedStep
from megatron_sd.rollout.engine import Completion, GenerationRequest, InferenceEngine, awake
from megatron_sd.rollout.running import RolloutStart, RunningRollout
from megatron_sd.rollout.sampling import rollout_seed
from megatron_sd.search.environment import Environment
from megatron_sd.search.tools import Tool, ToolCall

Result = TypeVar("Result")

STOP_CHECK_S = 0.1
NO_TOOLS: Mapping[str, Tool] = MappingProxyType({})


class Outcome(NamedTuple):
    """A rollout that has ended, and the error when it failed for infrastructure reasons."""

    rollout: Rollout
    error: Exception | None


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

    def on(self, engine: InferenceEngine) -> Rollouter:
        """The same rollouter with another engine."""
        other = copy.copy(self)
        other._engine = engine
        return other

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
        starts = [
            self.starts(question, block, step=step, place=place, greedy=greedy)
            for place, (question, block) in enumerate(zip(questions, blocks))
        ]
        if bank:
            bank.ask_for([(start.question_id, start.index) for group in starts for start in group])
        flat = [start for group in starts for start in group]
        with awake(self._engine), self._work.on("rollouts", len(flat), "ended") as task:
            outcomes = iter(
                asyncio.run(
                    self._run_all([self._find_or_roll_out(start, bank, task) for start in flat], task)
                )
            )
        results = [[next(outcomes) for _ in group] for group in starts]
        self.refuse_many_failures([outcome for group in results for outcome in group])
        return [
            RolloutGroup(question=question, rollouts=tuple(rollout for rollout, _ in group))
            for question, group in zip(questions, results)
        ]

    def starts(
        self, question: Question, block: str = "", *, step: int, place: int, greedy: bool = False
    ) -> list[RolloutStart]:
        """Of the rollouts of a question, by index. place: of the question in its step, for the name alone."""
        limits = self._environment.limits
        prompt_ids = self._environment.prompt_ids(question.text, block)
        return [
            RolloutStart(
                session=f"step {step}, question {place} ({question.id}), rollout {index}",
                question_id=question.id,
                index=index,
                prompt_ids=prompt_ids,
                seed=rollout_seed(self._seed, step=step, question_id=question.id, index=index),
                temperature=0.0 if greedy else limits.temperature,
            )
            for index in range(1 if greedy else limits.group_size)
        ]

    def search_again(self, asked: Sequence[AskedTurn]) -> list[tuple[Hit, ...] | None]:
        """What each turn's search finds when its query is sampled anew, greedily, behind the asked prompt;
        None where no query came of it.

        As `run`, it runs its own event loop, and raises StopRequested. A search that fails, by the retriever or
        the engine, counts as none; raises RolloutError when more than `max_failed_share` did.
        """
        with awake(self._engine), self._work.on("teacher's queries", len(asked), "ended") as task:
            work = [self._search_again(number, one, task) for number, one in enumerate(asked)]
            outcomes = asyncio.run(self._run_all(work, task))
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        limit = self._environment.limits.max_failed_share
        if len(failures) > limit * len(asked):
            raise RolloutError(
                f"{len(failures)} of {len(asked)} searches by the teacher's queries failed, expected at most"
                f" {limit:.0%} (rollout.max_failed_share); the first cause: {failures[0]}"
            ) from failures[0]
        return [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]

    async def _search_again(
        self, number: int, asked: AskedTurn, task: Task
    ) -> tuple[Hit, ...] | RetrievalError | RolloutError | None:
        turns, environment = asked.rollout.turns[: asked.turn], self._environment
        turn = asked.rollout.turns[asked.turn]
        begun = tuple(turn.completion_ids[: turn.query_span[0]])
        seen: list[int] = []
        for before in turns:
            seen += [*before.completion_ids, *before.observation_ids]
        # as much as the policy had, whose prompt is shorter
        budget = environment.turn_budget(len(asked.rollout.prompt_ids) + len(seen)) - len(begun)
        session = f"teacher's query {number} for {asked.rollout.question_id}, rollout {asked.rollout.index}"
        try:
            if budget <= 0:
                return None
            completion = await self._generate(
                GenerationRequest(
                    session=session,
                    prompt_ids=(*asked.prompt_ids, *seen, *begun),
                    max_new_tokens=budget,
                    temperature=0.0,
                    seed=0,
                    stop=environment.protocol.stop_strings,
                )
            )
            self._world.pulse.move()
            verdict = environment.judge(
                (*begun, *completion.ids),
                turn=sum(before.attempt == turn.attempt for before in turns),
                truncated=completion.finish == "length",
                attempt=turn.attempt,
            )
            if verdict.action is None or verdict.action.tool != SEARCH:
                return None
            (hits,) = await self._retriever.search([verdict.action.text], self._top_k)
            return hits
        except (RetrievalError, RolloutError) as error:
            return error
        finally:
            self._engine.release(session)
            task.add(done=1)

    async def _run_all(self, work: Sequence[Coroutine[Any, Any, Result]], task: Task) -> list[Result]:
        """One task each, started in order; an unexpected error, and a request to stop, end them all and are
        raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one) for one in work]
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

    async def _find_or_roll_out(self, start: RolloutStart, bank: BankedStep | None, task: Task) -> Outcome:
        banked = bank.find(start.question_id, start.index) if bank else None
        if banked is not None:
            task.add(done=1)
            return Outcome(banked, None)
        outcome = await self.finish(RunningRollout(start, start.prompt_ids), task)
        if bank and outcome.error is None:
            bank.keep(outcome.rollout)
        return outcome

    async def finish(self, running: RunningRollout, task: Task) -> Outcome:
        """Take a rollout to its end, from wherever it stands."""
        try:
            if running.unanswered is not None:
                await self._answer(running, running.unanswered)
            while running.stop is None:
                await self._take_turn(running, task)
        except RolloutError as error:
            return Outcome(running.rollout(StopReason.ENGINE_FAILED), error)
        except RetrievalError as error:
            return Outcome(running.rollout(StopReason.RETRIEVAL_FAILED), error)
        except ToolError as error:
            return Outcome(running.rollout(StopReason.TOOL_FAILED), error)
        finally:
            self._engine.release(running.start.session)
            task.add(done=1)
        return Outcome(running.rollout(running.stop), None)

    async def _take_turn(self, running: RunningRollout, task: Task) -> None:
        """Sample a completion, judge it, and append what the environment answers."""
        environment = self._environment
        budget = environment.turn_budget(len(running.ids))
        if budget == 0:
            running.stop = StopReason.TOKEN_LIMIT
            return
        completion = await self._complete(running, budget)
        self._world.pulse.move()
        task.add(tokens=len(completion.ids))
        verdict = environment.judge(
            completion.ids,
            turn=sum(turn.attempt == running.number for turn in running.turns),
            truncated=completion.finish == "length",
            attempt=running.number,
            called=Counter(turn.action.tool for turn in running.turns if turn.action is not None),
            num_faults=running.num_faults,
        )
        running.act(
            completion,
            verdict,
            well_formed=environment.is_well_formed(completion.ids, turn=len(running.turns)),
            note=environment.note(completion.ids),
        )
        if verdict.action is not None:
            await self._answer(running, verdict.action)
        elif verdict.stop is None:
            self._show(running, (), verdict.observation_ids)

    async def _answer(self, running: RunningRollout, action: Action) -> None:
        """Do what the last turn asked for."""
        self._show(running, *await self._serve(action, running))

    def _show(self, running: RunningRollout, hits: tuple[Hit, ...], observation: TokenIds) -> None:
        """Append what the environment says, unless no token is left for another turn."""
        if self._environment.turn_budget(len(running.ids) + len(observation)) == 0:
            observation, running.stop = (), StopReason.TOKEN_LIMIT
        running.observe(hits, observation)

    async def _serve(self, action: Action, running: RunningRollout) -> tuple[tuple[Hit, ...], TokenIds]:
        """What a search found, and what the policy is shown."""
        if action.tool == SEARCH:
            (hits,) = await self._retriever.search([action.text], self._top_k)
            return hits, self._environment.observation_ids(hits)
        call = ToolCall(question_id=running.start.question_id, turns=tuple(running.turns))
        return (), self._environment.result_ids(await self._tools[action.tool].answer(action.text, call))

    async def _complete(self, running: RunningRollout, budget: int) -> Completion:
        start = running.start
        request = GenerationRequest(
            session=start.session,
            prompt_ids=running.ids,
            max_new_tokens=budget,
            temperature=start.temperature,
            seed=start.seed,
            stop=self._environment.protocol.stop_strings,
        )
        return await self._generate(request)

    async def _generate(self, request: GenerationRequest) -> Completion:
        completion = await self._engine.generate(request)
        if not completion.ids:
            raise RolloutError(
                f"the engine returned no token for {request.session}, expected 1 to"
                f" {request.max_new_tokens}; see its log"
            )
        return completion

    def refuse_many_failures(self, outcomes: Sequence[Outcome]) -> None:
        """Raise RolloutError when more than `max_failed_share` failed for infrastructure reasons."""
        failures = [(rollout, error) for rollout, error in outcomes if error is not None]
        limit = self._environment.limits.max_failed_share
        if len(failures) <= limit * len(outcomes):
            return
        counts = Counter(rollout.stop_reason.value for rollout, _ in failures)
        raise RolloutError(
            f"{len(failures)} of {len(outcomes)} rollouts failed ({dict(counts)}), "
            f"expected at most {limit:.0%} (rollout.max_failed_share); the first cause: {failures[0][1]}"
        ) from failures[0][1]
