"""Which queries distil: those for which the teacher, asked itself, finds more than the policy did.

A hindsight block makes other queries likelier, not better ones. Here the teacher's own query is sampled and
searched for, and where it serves no hop that the policy's left open, nothing is distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages
from megatron_sd.algorithm.assemble import Teaching
from megatron_sd.algorithm.samples import Scope
from megatron_sd.records import Hit, Question, Rollout, RolloutGroup, TokenIds

Teach = Callable[[Sequence[RolloutGroup], Sequence[GroupAdvantages], int, Sequence[int]], list[Teaching]]


@dataclass(frozen=True, kw_only=True)
class AskedTurn:
    """A search to make once more: turn number `turn` of the rollout, behind another prompt, its own words up
    to where the query begins."""

    rollout: Rollout
    turn: int
    prompt_ids: TokenIds


# What each search finds with a greedy query; None: none came of it, or it failed.
Ask = Callable[[Sequence[AskedTurn]], Sequence[tuple[Hit, ...] | None]]


def teach_by_evidence(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[GroupAdvantages],
    step: int,
    numbers: Sequence[int],
    *,
    teach: Teach,
    scope: Scope,
    ask: Ask,
) -> list[Teaching]:
    """What `teach` shows the teacher, but for turns whose query the teacher itself would not have made a
    better one of (`finds_more`): these have no prompt.

    After the gate of IGSD (arXiv 2609.32694), which weighs tokens by how much likelier the gold answer
    becomes; here a query counts as a whole, by the hops that its passages serve. scope: turns outside of it
    are not asked for.
    """
    taught = teach(groups, advantages, step, numbers)
    asked = {
        (place, index, turn): AskedTurn(rollout=rollout, turn=turn, prompt_ids=prompt)
        for place, (number, own) in enumerate(zip(numbers, taught, strict=True))
        for index, (rollout, prompts) in enumerate(zip(groups[number].rollouts, own.prompts, strict=True))
        for turn, prompt in _asked_turns(rollout, prompts, scope)
    }
    kept = {}
    for (place, index, turn), hits in zip(asked, ask(list(asked.values())), strict=True):
        group = groups[numbers[place]]
        if hits is not None and finds_more(group.question, group.rollouts[index], turn, hits):
            kept[place, index, turn] = asked[place, index, turn].prompt_ids
    return [
        own._replace(
            prompts=[
                _prompts(rollout, [kept.get((place, index, turn)) for turn in range(len(rollout.turns))])
                for index, rollout in enumerate(groups[number].rollouts)
            ]
        )
        for place, (number, own) in enumerate(zip(numbers, taught, strict=True))
    ]


def finds_more(question: Question, rollout: Rollout, turn: int, hits: Sequence[Hit]) -> bool:
    """Whether the passages serve more hops of the question than those of the rollout's own turn, of hops that
    no earlier turn served. Never, where the question does not name its passages."""
    before = hops_served(question, [hit for earlier in rollout.turns[:turn] for hit in earlier.hits])
    found, own = (hops_served(question, some) - before for some in (hits, rollout.turns[turn].hits))
    return len(found) > len(own)


def hops_served(question: Question, hits: Sequence[Hit]) -> set[int]:
    """The numbers of the question's hops of which a serving passage is among the hits."""
    ids = {hit.passage.id for hit in hits}
    return {number for number, hop in enumerate(question.supporting) if ids.intersection(hop)}


def _asked_turns(
    rollout: Rollout, prompts: tuple[TokenIds | None, ...], scope: Scope
) -> list[tuple[int, TokenIds]]:
    """Turns that would distil, each with its teacher's prompt."""
    if not prompts or rollout.stop_reason.is_infrastructure:
        return []
    spans = scope(rollout)
    by_turn = prompts if len(prompts) > 1 else prompts * len(spans)
    return [
        (turn, prompt)
        for turn, ((start, stop), prompt) in enumerate(zip(spans, by_turn, strict=True))
        if start < stop and prompt is not None
    ]


def _prompts(rollout: Rollout, by_turn: list[TokenIds | None]) -> tuple[TokenIds | None, ...]:
    return tuple(by_turn) if any(prompt is not None for prompt in by_turn) else ()
