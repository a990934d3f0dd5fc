"""Scalars of a step, by TensorBoard name, computed from its rollouts."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_sd.records import SEARCH, Passage, Rollout, RolloutGroup, StopReason

_WORDS = re.compile(r"\w+")


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the rollouts of scored groups did and earned. Means are over usable rollouts; shares lie in [0,
    1].

    rollout/stop_<reason> is the share of all rollouts, infrastructure failures included. Hop hits are left
    out where no question names its passages. Empty when there is no rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    usable = [rollout for group in groups for rollout in group.usable]
    if not rollouts:
        return {}
    stops = Counter(rollout.stop_reason for rollout in rollouts)
    metrics = {f"rollout/stop_{reason}": stops[reason] / len(rollouts) for reason in StopReason}
    if usable:
        metrics |= _reward_metrics(usable) | _length_metrics(usable) | _group_metrics(groups)
    return metrics


def lag_metrics(groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """How old the weights were that sampled the rollouts of a step: rollout/policy_version, the oldest, and
    rollout/policy_lag_steps, the mean over turns of the optimiser steps taken since; 0 is on-policy.
    rollout/mixed_versions_share: of the rollouts, those that several versions sampled."""
    by_rollout = [
        [turn.policy_version for turn in rollout.turns] for group in groups for rollout in group.rollouts
    ]
    versions = [version for own in by_rollout for version in own]
    if not versions:
        return {}
    return {
        "rollout/mixed_versions_share": _mean(len(set(own)) > 1 for own in by_rollout),
        "rollout/policy_version": float(min(versions)),
        "rollout/policy_lag_steps": _mean(step - version for version in versions),
    }


def _reward_metrics(usable: Sequence[Rollout]) -> dict[str, float]:
    scores = [rollout.scores for rollout in usable]
    metrics = {
        "reward/mean": _mean(score.reward for score in scores),
        "reward/em": _mean(score.em for score in scores),
        "reward/f1": _mean(score.f1 for score in scores),
        "reward/format_valid": _mean(score.format_valid for score in scores),
    }
    most = max(len(score.em_by_attempt) for score in scores)
    for number in range(most):
        made = [score.em_by_attempt[number] for score in scores if number < len(score.em_by_attempt)]
        metrics[f"reward/em_attempt_{number + 1}"] = _mean(made)
    for name in scores[0].own:
        metrics[f"reward/{name}"] = _mean(score.own[name] for score in scores)
    hits = [score.hop_hit_rate for score in scores if score.hop_hit_rate is not None]
    return metrics | ({"rollout/hop_hit_rate": _mean(hits)} if hits else {})


def _tool_metrics(usable: Sequence[Rollout]) -> dict[str, float]:
    """Calls a rollout of every tool beside search that was called."""
    called = Counter(
        turn.action.tool for rollout in usable for turn in rollout.turns if turn.action is not None
    )
    return {
        f"rollout/calls_{name}": number / len(usable) for name, number in called.items() if name != SEARCH
    }


def _length_metrics(usable: Sequence[Rollout]) -> dict[str, float]:
    queries = [[folded_query(query) for query in rollout.queries] for rollout in usable]
    num_queries = sum(map(len, queries))
    num_repeats = sum(len(own) - len(set(own)) for own in queries)
    return {
        "rollout/searches": num_queries / len(usable),
        **_tool_metrics(usable),
        "rollout/turns": _mean(len(rollout.turns) for rollout in usable),
        "rollout/completion_tokens": _mean(
            sum(len(turn.completion_ids) for turn in rollout.turns) for rollout in usable
        ),
        "rollout/observation_tokens": _mean(
            sum(len(turn.observation_ids) for turn in rollout.turns) for rollout in usable
        ),
        "rollout/total_tokens_max": float(max(rollout.num_tokens for rollout in usable)),
        "rollout/duplicate_query_share": num_repeats / num_queries if num_queries else 0.0,
    }


def _group_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Shares of groups by outcome, right meaning exact match, and of groups in which GRPO has no gradient."""
    outcomes = [[rollout.scores.em == 1.0 for rollout in group.usable] for group in groups if group.usable]
    rewards = [{rollout.scores.reward for rollout in group.usable} for group in groups if group.usable]
    return {
        "distill/share_groups_all_wrong": _mean(not any(right) for right in outcomes),
        "distill/share_groups_all_right": _mean(all(right) for right in outcomes),
        "distill/share_groups_mixed": _mean(any(right) and not all(right) for right in outcomes),
        "distill/share_groups_no_spread": _mean(len(distinct) == 1 for distinct in rewards),
    }


class BlockFigures(NamedTuple):
    """Of one usable rollout and its block. has_block: there is one; what follows is None, or empty, without it.
    has_gold: it holds a gold answer as whole words, case ignored. unseen: share of the words of the siblings'
    queries that stand neither in the question, nor in the rollout's own queries, nor in the passages it saw:
    the student could not know them. copied: for each label (CORRECT, F1 above 0, and INCORRECT) that a sibling
    bears, of each of the rollout's queries whether such a sibling asked it word for word."""

    has_block: bool
    has_gold: bool | None = None
    unseen: float | None = None
    copied: Mapping[str, tuple[bool, ...]] = {}


def block_figures(pairs: Iterable[tuple[RolloutGroup, Sequence[str]]]) -> list[BlockFigures]:
    """Of the usable rollouts of groups, each given with the texts of its rollouts' blocks. The costly part of
    what is told of blocks: words are counted here."""
    return [
        _figures(group, rollout, block) if block else BlockFigures(has_block=False)
        for group, own in pairs
        for rollout, block in zip(group.rollouts, own, strict=True)
        if not rollout.stop_reason.is_infrastructure
    ]


def block_metrics(figures: Sequence[BlockFigures]) -> dict[str, float]:
    """What the hindsight blocks of a step reveal (docs/method.md, section 5, points 3 and 4), by TensorBoard
    name: distill/share_rollouts_with_block, and over these alone share_blocks_with_gold,
    share_block_words_unseen, copy_rate_correct and copy_rate_incorrect; a rate is left out when no sibling
    bears the label. Empty when no rollout is usable; only the first figure when no rollout has a block.
    """
    if not figures:
        return {}
    shown = [own for own in figures if own.has_block]
    metrics = {"distill/share_rollouts_with_block": len(shown) / len(figures)}
    if shown:
        metrics["distill/share_blocks_with_gold"] = _mean(bool(own.has_gold) for own in shown)
        metrics["distill/share_block_words_unseen"] = _mean(own.unseen or 0.0 for own in shown)
    for label in ("correct", "incorrect"):
        flags = [flag for own in shown for flag in own.copied.get(label, ())]
        if flags:
            metrics[f"distill/copy_rate_{label}"] = _mean(flags)
    return metrics


def _figures(group: RolloutGroup, rollout: Rollout, block: str) -> BlockFigures:
    return BlockFigures(
        has_block=True,
        has_gold=_holds_any(block, group.question.golden_answers),
        unseen=_unseen_share(group, rollout),
        copied=_copied(group, rollout),
    )


def _unseen_share(group: RolloutGroup, rollout: Rollout) -> float:
    siblings = [other for other in group.usable if other is not rollout]
    words = _words(query for other in siblings for query in other.queries)
    unseen = words - _words([group.question.text, *rollout.queries])
    for turn in rollout.turns:
        for hit in turn.hits:
            unseen -= _passage_words(hit.passage)
    return len(unseen) / len(words) if words else 0.0


# the rollouts of a question, which come one after another, see the same passages
@functools.lru_cache(maxsize=512)
def _passage_words(passage: Passage) -> frozenset[str]:
    return frozenset(_words((passage.title, passage.text)))


def _copied(group: RolloutGroup, rollout: Rollout) -> Mapping[str, tuple[bool, ...]]:
    copied = {}
    for label, is_correct in (("correct", True), ("incorrect", False)):
        siblings = [o for o in group.usable if o is not rollout and (o.scores.f1 > 0) == is_correct]
        asked = {folded_query(query) for other in siblings for query in other.queries}
        if siblings:
            copied[label] = tuple(folded_query(query) in asked for query in rollout.queries)
    return copied


def folded_query(text: str) -> str:
    """A query as it is compared with others: upper or lower case and spaces do not count."""
    return " ".join(text.casefold().split())


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in _WORDS.findall(text.casefold())}


def _holds_any(block: str, golden_answers: Sequence[str]) -> bool:
    words = f" {' '.join(_WORDS.findall(block.casefold()))} "
    golds = (" ".join(_WORDS.findall(gold.casefold())) for gold in golden_answers)
    return any(gold and f" {gold} " in words for gold in golds)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
