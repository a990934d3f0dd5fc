"""One attempt at one question, as a strategy sees it: begin a context, write, search, read. All of it is
kept as a `Rollout`."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_sd.errors import RolloutError
from megatron_sd.records import SEARCH, Action, Hit, Question, Rollout, StopReason, TokenIds, Turn
from megatron_sd.retrieval.retriever import Retriever
from megatron_sd.rollout.engine import Completion, GenerationRequest, InferenceEngine
from megatron_sd.search.environment import Environment
from megatron_sd.search.tokens import TextCodec


class OutOfTokensError(Exception):
    """The context is full: the attempt ends without an answer. Only the runner sees it."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What all attempts share. The environment lends its tokenizer, its limits and its sanitising; its
    protocol is not used."""

    engine: InferenceEngine
    retriever: Retriever
    environment: Environment
    top_k: int


class Conversation:
    """What one attempt has read and written so far.

    The limits are the environment's: max_turn_tokens a completion, max_observation_tokens a search,
    max_rollout_tokens a context. question: its text, sanitised. hits: of the newest search.
    """

    def __init__(
        self, question: Question, tools: Tools, *, session: str, index: int, seed: int, temperature: float
    ):
        self.question = tools.environment.sanitizer.clean(question.text)
        self.max_searches = tools.environment.limits.max_search_turns
        self.hits: tuple[Hit, ...] = ()
        self._question_id = question.id
        self._tools = tools
        self._session = session
        self._index = index
        self._seed = seed
        self._temperature = temperature
        self._contexts: list[Context] = []
        self._turns: list[Turn] = []

    def begin(self, prompt: str, so_far: TokenIds = ()) -> Context:
        """A new context: the prompt, wrapped as the model's chat template says, and ids that the model
        wrote elsewhere."""
        codec = self._tools.environment.codec
        name = f"{self._session}, context {len(self._contexts)}"
        context = Context(name, codec.prompt_ids(prompt), so_far, attempt=self, codec=codec)
        self._contexts.append(context)
        return context

    async def search(self, query: str) -> str:
        """What `passages` says of the best hits for a query; nothing for an empty query, which is no search.

        The search belongs to the newest completion. One that comes before any completion stands in a turn
        without one.
        """
        query = self._tools.environment.sanitizer.clean_query(query)
        self.hits = ()
        if not query:
            self.mark_malformed()
            return ""
        (self.hits,) = await self._tools.retriever.search([query], self._tools.top_k)
        if not self._turns:
            self._turns.append(Turn(completion_ids=(), completion_logprobs=()))
        action = Action(tool=SEARCH, text=query)
        self._turns[-1] = dataclasses.replace(self._turns[-1], action=action, hits=self.hits)
        return self.passages(self.hits)

    def passages(self, hits: Sequence[Hit]) -> str:
        """Passages as text, `[rank] title: text` a line, sanitised and cut to max_observation_tokens."""
        environment = self._tools.environment
        clean = environment.sanitizer.clean
        lines = "".join(
            clean(f"[{rank}] {h.passage.title}: {h.passage.text}") + "\n"
            for rank, h in enumerate(hits, start=1)
        )
        ids = environment.codec.encode(lines)
        limit = environment.limits.max_observation_tokens
        return lines if len(ids) <= limit else environment.codec.decode(ids[:limit]).rstrip("\ufffd\n") + "\n"

    def mark_malformed(self) -> None:
        """The newest completion is not what its prompt asked for."""
        if self._turns:
            self._turns[-1] = dataclasses.replace(self._turns[-1], well_formed=False)

    def close(self) -> None:
        """The attempt is over: the engine may forget its contexts."""
        for context in self._contexts:
            self._tools.engine.release(context.session)

    def rollout(self, stop_reason: StopReason, answer: str | None = None) -> Rollout:
        """The record of what happened so far, whichever context it stood in. prompt_ids: of the first
        context."""
        return Rollout(
            question_id=self._question_id,
            index=self._index,
            prompt_ids=self._contexts[0].prompt_ids if self._contexts else (),
            turns=tuple(self._turns),
            stop_reason=stop_reason,
            answer=answer,
        )

    async def complete(self, context: Context, stop: Sequence[str]) -> Completion:
        """One completion in a context (`Context.write`). Raises OutOfTokensError, RolloutError when there
        is none."""
        budget = self._tools.environment.turn_budget(len(context.ids))
        if budget == 0:
            raise OutOfTokensError
        request = GenerationRequest(
            session=context.session,
            prompt_ids=context.ids,
            max_new_tokens=budget,
            temperature=self._temperature,
            seed=self._seed + self._contexts.index(context),
            stop=tuple(stop),
        )
        completion = await self._tools.engine.generate(request)
        if not completion.ids:
            raise RolloutError(
                f"the engine returned no token for {context.session}, expected 1 to {budget}; see its log"
            )
        turn = Turn(
            completion_ids=completion.ids,
            completion_logprobs=completion.logprobs,
            policy_version=completion.policy_version,
        )
        self._turns.append(turn)
        return completion

    def observe(self, ids: TokenIds) -> None:
        """The newest completion is followed by ids that the model did not write (`Context.read`)."""
        last = self._turns[-1]
        self._turns[-1] = dataclasses.replace(last, observation_ids=(*last.observation_ids, *ids))


class Context:
    """One growing text that the engine sees: the model writes in it, and reads what it did not write. Ids
    stay as sampled."""

    def __init__(
        self, session: str, prompt_ids: TokenIds, so_far: TokenIds, *, attempt: Conversation, codec: TextCodec
    ):
        self.session = session
        self.prompt_ids = prompt_ids
        self.written = so_far  # everything after the prompt
        self._attempt = attempt
        self._codec = codec

    @property
    def ids(self) -> TokenIds:
        """All that the engine has to see."""
        return (*self.prompt_ids, *self.written)

    @property
    def text(self) -> str:
        """What stands after the prompt, control tokens left out."""
        return self._decode(self.written)

    async def write(self, stop: Sequence[str]) -> str:
        """What the model writes next, control tokens left out. Sampling ends after a stop string, which the
        result keeps."""
        completion = await self._attempt.complete(self, stop)
        self.written = (*self.written, *completion.ids)
        return self._decode(completion.ids)

    def read(self, text: str) -> None:
        """Append text that the model did not write. Where it has written nothing yet, the text belongs to
        the prompt."""
        ids = self._codec.encode(text)
        if self.written:
            self.written = (*self.written, *ids)
            self._attempt.observe(ids)
        else:
            self.prompt_ids = (*self.prompt_ids, *ids)

    def _decode(self, ids: TokenIds) -> str:
        return self._codec.decode(i for i in ids if i not in self._codec.control_ids)


Solve = Callable[[Conversation], Awaitable[str | None]]  # a strategy: the answer, or None when it gave none
