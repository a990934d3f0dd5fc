"""Does the teacher tell good queries from bad ones? Areas under the ROC curve, each beside what the
position alone would give.

Early queries of a multi-hop question find something more often than late ones, so any score that falls
along the rollout looks informed. Hence three figures: within rollouts, the same for "earlier is better",
and between queries of the same place in different rollouts of a question that ended alike
(position-matched). And a block that shows a query makes it certain: the less likely the policy found it, the more
it gains, whatever it is worth. So "likelier is better" stands beside them, which knows the policy alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.credit.queries import QueryCredit
from eval.gate.lift import Estimate, bootstrap_mean

Score = Callable[[QueryCredit], float]

GROUP_KINDS = ("all", "mixed", "all_wrong", "all_right")
POSITION = "earlier_is_better"  # what position alone would give
SCORES: Mapping[str, Score] = {
    "log_ratio": lambda query: query.log_ratio,
    "jsd": lambda query: query.jsd,
    POSITION: lambda query: -float(query.number),
}
# of queries of which they are known
OPTIONAL_SCORES: Mapping[str, Callable[[QueryCredit], float | None]] = {
    "likelier_is_better": lambda query: query.student_logprob,
    "usefulness": lambda query: query.usefulness,
}


@dataclass(frozen=True, kw_only=True)
class CreditTable:
    """within, matched: by group kind and name of SCORES, the mean AUC over questions with its interval; 0.5
    knows nothing.

    leak_share, copy_share, hit_share: of the queries; hit_share of those of which it is known."""

    num_queries: int
    num_rollouts: int
    hit_share: float
    leak_share: float
    copy_share: float
    within: Mapping[str, Mapping[str, Estimate]]
    matched: Mapping[str, Mapping[str, Estimate]]

    def lines(self) -> list[str]:
        """For people."""
        head = (
            f"{self.num_queries} queries of {self.num_rollouts} rollouts: {self.hit_share:.1%} hit,"
            f" {self.leak_share:.1%} leak a gold answer, {self.copy_share:.1%} copy another rollout's"
        )
        rows = [f"{'AUC (0.5 knows nothing)':<36}{'groups':<11}mean over questions [95 %]"]
        for place, table in (("within rollouts", self.within), ("position-matched", self.matched)):
            for name in table["all"]:
                rows += [
                    f"{f'{place}, {name}':<36}{kind:<11}{_shown(table[kind][name])}" for kind in GROUP_KINDS
                ]
        return [head, *rows]


def _shown(area: Estimate) -> str:
    if area.num_questions == 0:
        return "no question has both kinds of queries"
    return f"{area.mean:.3f} [{area.low:.3f}, {area.high:.3f}] n={area.num_questions}"


def credit_table(queries: Sequence[QueryCredit], *, num_resamples: int, seed: int) -> CreditTable:
    """All figures. Queries of which nobody knows whether they hit take no part in the areas."""
    known = [query for query in queries if query.hit is not None]
    scores = dict(SCORES) | {
        name: own for name, own in OPTIONAL_SCORES.items() if all(own(query) is not None for query in known)
    }

    def estimates(cut: Callable[[Iterable[QueryCredit]], list[list[QueryCredit]]], names: Sequence[str]):
        return {
            kind: {
                name: _mean_auc(cut(_of_kind(known, kind)), scores[name], num_resamples, seed)
                for name in names
            }
            for kind in GROUP_KINDS
        }

    return CreditTable(
        num_queries=len(queries),
        num_rollouts=len({(query.question_id, query.rollout) for query in queries}),
        hit_share=_share(query.hit for query in known),
        leak_share=_share(query.leak for query in queries),
        copy_share=_share(query.copy for query in queries),
        within=estimates(by_rollout, list(scores)),
        matched=estimates(by_place, [name for name in scores if name != POSITION]),
    )


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive's score beats a negative's, ties counting half; NaN without both
    (Mann-Whitney's U / (n m))."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean()) if difference.size else float("nan")


def by_rollout(queries: Iterable[QueryCredit]) -> list[list[QueryCredit]]:
    """The queries of each rollout."""
    return _grouped(queries, lambda query: (query.question_id, query.rollout))


def by_place(queries: Iterable[QueryCredit]) -> list[list[QueryCredit]]:
    """Queries of the same question and place, of rollouts that ended alike."""
    return _grouped(queries, lambda query: (query.question_id, query.number, query.correct))


def _grouped(queries: Iterable[QueryCredit], key: Callable[[QueryCredit], object]) -> list[list[QueryCredit]]:
    groups = defaultdict(list)
    for query in queries:
        groups[key(query)].append(query)
    return list(groups.values())


def _of_kind(queries: Sequence[QueryCredit], kind: str) -> list[QueryCredit]:
    return [query for query in queries if kind in ("all", query.group_kind)]


def _mean_auc(sets: Sequence[Sequence[QueryCredit]], score: Score, num_resamples: int, seed: int) -> Estimate:
    """Mean over questions of the mean over their sets that hold both labels."""
    areas = defaultdict(list)
    for queries in sets:
        area = auc([score(query) for query in queries], [bool(query.hit) for query in queries])
        if not np.isnan(area):
            areas[queries[0].question_id].append(area)
    return bootstrap_mean(np.array([np.mean(found) for found in areas.values()]), num_resamples, seed)


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return sum(found) / len(found) if found else float("nan")
