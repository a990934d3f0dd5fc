"""When turns of a group's rollouts stand in the same place: what they had seen when they were sampled.

A search's result depends on its query alone, so what a rollout has seen says where it stands. The three ways
to tell:

    seen         the set of all passages found so far (our choice: where retrieval is deterministic, what can
                 still happen depends on it alone)
    observation  the passages of the newest search alone, in order (GiGPO's anchor)
    similar      as observation, but sets that overlap by nine tenths (Jaccard) are one place; the first turn of
                 a place decides, in the order of rollouts and turns

Every rollout's first turn stands at the question. After a turn that found nothing, `observation` and `similar`
know nothing to compare by, so such a turn stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from megatron_sd.records import Rollout

SIMILARITY = 0.9

# Of usable rollouts, for each turn and for the end: a place, equal where they stand in the same one. [K + 1]
Places = list[list[Hashable]]


def seen(rollouts: Sequence[Rollout]) -> Places:
    """By the set of all passages found so far."""
    places: Places = []
    for rollout in rollouts:
        found: frozenset[str] = frozenset()
        own: list[Hashable] = [found]
        for turn in rollout.turns:
            found |= {hit.passage.id for hit in turn.hits}
            own.append(found)
        places.append(own)
    return places


def observation(rollouts: Sequence[Rollout]) -> Places:
    """By the passages of the newest search, in order."""
    places: Places = []
    for number, rollout in enumerate(rollouts):
        own: list[Hashable] = [()]
        for turn_number, turn in enumerate(rollout.turns):
            ids = tuple(hit.passage.id for hit in turn.hits)
            own.append(ids or ("alone", number, turn_number))
        places.append(own)
    return places


def similar(rollouts: Sequence[Rollout]) -> Places:
    """By the passages of the newest search, where sets that overlap by SIMILARITY are one."""
    firsts: list[frozenset[Hashable]] = []  # of each place that is known

    def place_of(ids: Hashable) -> Hashable:
        if not isinstance(ids, tuple) or not ids or ids[0] == "alone":
            return ids
        own = frozenset(ids)
        for first in firsts:
            if len(own & first) >= SIMILARITY * len(own | first):
                return first
        firsts.append(own)
        return own

    return [[place_of(ids) for ids in own] for own in observation(rollouts)]


STATES: Mapping[str, Callable[[Sequence[Rollout]], Places]] = {
    "seen": seen,
    "observation": observation,
    "similar": similar,
}
