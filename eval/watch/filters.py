"""What is looked for among the newest rollouts, as pure functions of a transcript's JSON records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from eval.report_page.groups import Record, is_failed, is_right
from megatron_sd.observability.metrics import folded_query
from megatron_sd.records import StopReason

TRUNCATED = (StopReason.TOKEN_LIMIT, StopReason.TURN_LIMIT)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """title: what people read. holds: of a rollout's record and its question's."""

    title: str
    holds: Callable[[Record, Record], bool]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """How many groups have a rollout that a filter holds for, and how many rollouts it holds for."""

    groups: int
    rollouts: int


def is_wrong_despite_gold(rollout: Record, question: Record) -> bool:
    """It did not answer right although a search of it returned a passage that a hop needs. Infrastructure
    failures are neither right nor wrong."""
    gold = {name for hop in question["supporting"] for name in hop}
    seen = {hit["passage"]["id"] for turn in rollout["turns"] for hit in turn["hits"]}
    return not is_failed(rollout) and not is_right(rollout) and bool(gold & seen)


def repeats_a_query(rollout: Record, question: Record) -> bool:
    """It searched twice for the same words, as rollout/duplicate_query_share counts them."""
    queries = [folded_query(turn["query"]) for turn in rollout["turns"] if turn["query"] is not None]
    return len(set(queries)) < len(queries)


def is_truncated(rollout: Record, question: Record) -> bool:
    """It ran out of tokens or of turns."""
    return rollout["stop_reason"] in TRUNCATED


def retrieval_failed(rollout: Record, question: Record) -> bool:
    """The retriever gave up, so that it is no data."""
    return rollout["stop_reason"] == StopReason.RETRIEVAL_FAILED


FILTERS: Mapping[str, Filter] = {
    "wrong-despite-gold": Filter(title="wrong though a gold passage was seen", holds=is_wrong_despite_gold),
    "repeated-query": Filter(title="repeated query", holds=repeats_a_query),
    "truncated": Filter(title="truncated", holds=is_truncated),
    "retrieval-failed": Filter(title="retrieval failed", holds=retrieval_failed),
}


def tags(rollout: Record, question: Record) -> dict[str, str]:
    """The titles of the filters that hold for a rollout, by their names."""
    return {name: own.title for name, own in FILTERS.items() if own.holds(rollout, question)}


def count(groups: Iterable[Record]) -> dict[str, Matches]:
    """Of every filter."""
    found = [[tags(rollout, group["question"]) for rollout in group["rollouts"]] for group in groups]
    return {
        name: Matches(
            groups=sum(any(name in own for own in rollouts) for rollouts in found),
            rollouts=sum(name in own for rollouts in found for own in rollouts),
        )
        for name in FILTERS
    }
