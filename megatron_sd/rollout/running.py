"""A rollout while it runs: what it starts from, what it has done, and how it is written down before it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sd.compact import as_fields
from megatron_sd.records import Action, Hit, Rollout, StopReason, TokenIds, Turn
from megatron_sd.rollout.engine import Completion
from megatron_sd.rollout.stored import turn_of
from megatron_sd.search.environment import Verdict


@dataclass(frozen=True, kw_only=True)
class RolloutStart:
    """What a rollout starts from. session: its name in the engine. index: its place in the group."""

    session: str
    question_id: str
    index: int
    prompt_ids: TokenIds
    seed: int
    temperature: float


@dataclass
class RunningRollout:
    """ids: everything the engine has to see before the next turn. number: of the attempt at work. num_faults:
    native calls that could not be read. stop: why it ended, None while it runs."""

    start: RolloutStart
    ids: TokenIds
    turns: list[Turn] = field(default_factory=list)
    answer: str | None = None
    stop: StopReason | None = None
    number: int = 0
    num_faults: int = 0

    @property
    def unanswered(self) -> Action | None:
        """What its last turn asked the environment for, while there is no answer yet."""
        if self.stop is not None or not self.turns or self.turns[-1].observation_ids:
            return None
        return self.turns[-1].action

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
            question_id=self.start.question_id,
            index=self.start.index,
            prompt_ids=self.start.prompt_ids,
            turns=tuple(self.turns),
            stop_reason=stop_reason,
            answer=self.answer,
        )

    def fields(self) -> dict[str, Any]:
        """What `resumed` makes the same rollout of, as JSON values."""
        own = {"answer": self.answer, "stop": self.stop, "number": self.number, "num_faults": self.num_faults}
        return {**own, "turns": [as_fields(turn) for turn in self.turns]}

    @classmethod
    def resumed(cls, start: RolloutStart, fields: Mapping[str, Any]) -> RunningRollout:
        """The rollout that `fields` wrote down, begun from the same start."""
        turns = [turn_of(turn) for turn in fields["turns"]]
        ids = [*start.prompt_ids]
        for turn in turns:
            ids += [*turn.completion_ids, *turn.observation_ids]
        return cls(
            start,
            tuple(ids),
            turns,
            answer=fields["answer"],
            stop=None if fields["stop"] is None else StopReason(fields["stop"]),
            number=fields["number"],
            num_faults=fields["num_faults"],
        )
