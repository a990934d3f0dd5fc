"""GraphHCA: the group's turns pooled into one graph of places, whose chances of success give each turn its
credit."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from megatron_sd.algorithm.advantages.estimator import GroupAdvantages, relative
from megatron_sd.algorithm.advantages.from_rewards import grpo
from megatron_sd.algorithm.advantages.states import STATES
from megatron_sd.config import AdvantageConfig
from megatron_sd.records import Rollout, RolloutGroup

FLOOR = 0.01  # of a chance of success before its logarithm is taken
TOLERANCE = 1e-12
_SUCCESS, _FAILURE = "success", "failure"

Edge = tuple[Hashable, Hashable]  # from a place to the next


def graph_hca(groups: Sequence[RolloutGroup], config: AdvantageConfig) -> list[GroupAdvantages]:
    """A_ik = A_i of GRPO + w credit_ik (after GraphHCA, arXiv 2609.35084).

    Places (states.py) and the turns between them make a graph; a rollout's last turn leads to success (exact
    match) or failure. The chance of success from a place is phi(s) = discount * sum over its turns of
    phi(next) / number of turns, 1 and 0 at the ends. A turn's raw credit is ln max(phi(next), .01) - ln
    max(phi(s), .01), standardised (sample deviation + 1e-6) among the turns taken from the same place: alone
    there, or without spread, 0. w: config.weight; 0 is GRPO bit for bit. Which deviation the authors take is
    not known to us.
    """
    found = []
    for group, whole in zip(groups, grpo(groups, config), strict=True):
        credits = turn_credits(group.usable, config)
        found.append(
            [
                tuple(
                    number + config.weight * credits.get((rollout.index, k), 0.0) if config.weight else number
                    for k, number in enumerate(numbers)
                )
                for rollout, numbers in zip(group.rollouts, whole, strict=True)
            ]
        )
    return found


def turn_credits(rollouts: Sequence[Rollout], config: AdvantageConfig) -> dict[tuple[int, int], float]:
    """By (rollout's index, turn): the standardised credit."""
    edges: dict[tuple[int, int], Edge] = {}
    for rollout, places in zip(rollouts, STATES[config.state](rollouts), strict=True):
        last = len(rollout.turns) - 1
        end = _SUCCESS if rollout.scores is not None and rollout.scores.em == 1.0 else _FAILURE
        for k in range(len(rollout.turns)):
            edges[rollout.index, k] = (places[k], end if k == last else places[k + 1])
    chances = success_chances(list(edges.values()), config.discount)
    by_place: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for turn, (place, _) in edges.items():
        by_place[place].append(turn)
    credits: dict[tuple[int, int], float] = {}
    for turns in by_place.values():
        raw = [_log(chances[edges[turn][1]]) - _log(chances[edges[turn][0]]) for turn in turns]
        credits |= zip(turns, _standardised(raw), strict=True)
    return credits


def success_chances(edges: Sequence[Edge], discount: float) -> Mapping[Hashable, float]:
    """phi of every place. A turn that leads nowhere new leads back to its place, for which phi is solved;
    longer ways back make it the limit of an iteration, which a discount below 1 makes a contraction. From
    the ends backwards it is there after few rounds."""
    counts: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for place, next_place in edges:
        counts[place][next_place] += 1
    chances: dict[Hashable, float] = dict.fromkeys(counts, 0.0) | {_SUCCESS: 1.0, _FAILURE: 0.0}
    change = 1.0
    while change > TOLERANCE:
        change = 0.0
        for place, following in reversed(counts.items()):
            onwards = sum(number * chances[after] for after, number in following.items() if after != place)
            value = discount * onwards / (following.total() - discount * following[place])
            change, chances[place] = max(change, abs(value - chances[place])), value
    return chances


def _log(chance: float) -> float:
    return math.log(max(chance, FLOOR))


def _standardised(values: Sequence[float]) -> list[float]:
    """Values that only the iteration's rounding tells apart count as equal."""
    same = math.isclose(min(values), max(values), abs_tol=1e-9)
    return [0.0] * len(values) if same else relative(values, scaled=True)
