"""What is known of each query of stored rollouts: what the teacher says of it, and whether it found
anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.metrics import answer_in_passages, holds_answer
from megatron_sd.algorithm.evidence import hops_served
from megatron_sd.records import Hit, Question, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class QueryCredit:
    """One search query. number: its place among the rollout's queries, from 0. group_kind: mixed, all_wrong
    or all_right.

    log_ratios: [Q] nats, teacher minus student, of its tokens; log_ratio: their mean. jsd, student_logprob:
    means over its tokens, nats. hit: it found something that the rollout needed and did not have; None
    where nobody knows. usefulness: nats by which the gold answer's loss falls (usefulness.py); None where it
    was not measured. leak: it holds a gold answer that neither the question nor an earlier passage does. copy: another
    rollout of the question searched for the same.
    """

    question_id: str
    rollout: int
    number: int
    text: str
    group_kind: str
    correct: bool
    hit: bool | None
    leak: bool
    copy: bool
    log_ratios: tuple[float, ...]
    jsd: float
    usefulness: float | None = None
    student_logprob: float | None = None

    @property
    def log_ratio(self) -> float:
        """Mean over the query's tokens."""
        return sum(self.log_ratios) / len(self.log_ratios)


@dataclass(frozen=True, kw_only=True)
class QueryFacts:
    """What a transcript alone says of a query."""

    hit: bool | None
    leak: bool
    copy: bool


def query_facts(group: RolloutGroup, rollout: Rollout) -> list[QueryFacts]:
    """Of every query of a rollout, in order.

    A hit is a supporting passage of a hop that no earlier query served; where the question names none, a
    passage that holds a gold answer when no earlier one did; where there is no gold answer either, None.
    """
    others = {_plain(query) for other in group.rollouts if other is not rollout for query in other.queries}
    facts = []
    seen: list[Hit] = []
    for turn in rollout.turns:
        if turn.query is None:
            continue
        facts.append(
            QueryFacts(
                hit=_is_hit(group.question, seen, turn.hits),
                leak=_leaks(group.question, seen, turn.query),
                copy=_plain(turn.query) in others,
            )
        )
        seen += turn.hits
    return facts


def _is_hit(question: Question, seen: Sequence[Hit], found: Sequence[Hit]) -> bool | None:
    if question.supporting:
        return bool(hops_served(question, found) - hops_served(question, seen))
    if not question.golden_answers:
        return None
    golds = question.golden_answers
    return bool(answer_in_passages(found, golds)) and not answer_in_passages(seen, golds)


def _leaks(question: Question, seen: Sequence[Hit], query: str) -> bool:
    known = [question.text, *(text for hit in seen for text in (hit.passage.title, hit.passage.text))]
    return any(
        holds_answer(query, gold) and not any(holds_answer(text, gold) for text in known)
        for gold in question.golden_answers
    )


def _plain(query: str) -> str:
    return " ".join(query.lower().split())
