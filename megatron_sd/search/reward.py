"""Rewards: how an answer compares with the gold answers, and what a rollout earns.

Two normalisations. `search_r1` is SQuAD's, as Search-R1 and its relatives use it: comparable with published
numbers, and with known quirks (see `normalize_search_r1`). `strict` mends them (see `normalize_strict`).
Answers come from `Rollout.answer` only, which is read from the policy's own tokens: a passage that holds an
answer tag earns nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sd.config import RewardConfig, RewardJudgeConfig
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import RolloutError
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.seam import Seam, fault_of_number
from megatron_sd.records import Question, Rollout, RolloutGroup, Scores, StopReason
from megatron_sd.search.judge import AnswerJudge, GivenAnswer
from megatron_sd.search.native_calls import UnreadableCallError, read_call
from megatron_sd.search.reward_shapes import REWARD_SHAPES, RewardParts, overlong_penalty

if TYPE_CHECKING:  # the protocol needs tokenizers, and those who only compare answers need none
    from megatron_sd.search.protocol import Protocol

Normalizer = Callable[[str], str]

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_STRAIGHT_QUOTES = str.maketrans("‘’‚‛´`“”„‟«»", "''''''" + '"' * 6, "\ue000\ue001")
_DASHES = re.compile("[‐‑‒–—―−]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MINUS = re.compile(r"(?:^|(?<=[\s(]))-(?=\.?\d)")
_DECIMAL_POINT = re.compile("(?:^|(?<=[\\s(\ue000\\d]))\\.(?=\\d)")
_KEPT_MARKS = {"\ue000": "-", "\ue001": "."}  # private-use stand-ins while punctuation is removed
_CLOSED_CLASS_ANSWERS = ("yes", "no", "noanswer")


def normalize_search_r1(text: str) -> str:
    """Lower case, drop ASCII punctuation, drop the articles a/an/the, squeeze white space, in this order
    (SQuAD's script).

    Quirks kept for comparability: "3.5" equals "35", "-5" equals "5", "The A" becomes empty, "café" differs
    from "cafe" and from its own decomposed form, curly quotes stay.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def normalize_strict(text: str) -> str:
    """Unicode-aware normalisation that keeps numbers apart.

    - NFKC and case folding: composed and decomposed forms, full-width letters and "STRASSE"/"straße" agree;
    diacritics still
      count ("café" is not "cafe").
    - A minus sign before a number and a decimal point inside one stay ("-5" is not "5", "3.5" is not "35");
    commas between
      thousands go ("1,000" equals "1000").
    - Every other punctuation mark or symbol goes: apostrophes and full stops without a trace ("U.S." equals
    "US"), the rest
      as a space ("Spider-Man" equals "spider man", "1990–1995" equals "1990-1995").
    - The articles a/an/the go, unless nothing else is left ("The A" stays "the a").
    """
    text = unicodedata.normalize("NFKC", text.translate(_STRAIGHT_QUOTES))
    text = unicodedata.normalize("NFKC", text.casefold())
    text = _THOUSANDS.sub("", _DASHES.sub("-", text))
    text = _DECIMAL_POINT.sub("\ue001", _MINUS.sub("\ue000", text))
    characters = "".join(_without_punctuation(character) for character in text)
    words = unicodedata.normalize("NFKC", characters).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _without_punctuation(character: str) -> str:
    if character in _KEPT_MARKS:
        return _KEPT_MARKS[character]
    if character in "'.":
        return ""
    return " " if unicodedata.category(character)[0] in "PSC" else character


NORMALIZERS: dict[str, Normalizer] = {"search_r1": normalize_search_r1, "strict": normalize_strict}


def empty_answers(golden_answers: Sequence[str]) -> list[str]:
    """The gold answers of which Search-R1's normalisation leaves nothing ("The", "!?"): an empty answer
    would match them."""
    return [gold for gold in golden_answers if not normalize_search_r1(gold)]


def exact_match(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """1.0 when the normalised answer equals a normalised gold answer, else 0.0 (Search-R1's EM)."""
    normalized = normalize(answer)
    return float(any(normalize(gold) == normalized for gold in golden_answers))


def sub_em(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """1.0 when a normalised gold answer occurs in the normalised answer, else 0.0 (Search-R1's substring EM).

    Under `search_r1` any substring counts ("Norway" contains "no"), under `strict` whole words only.
    """
    normalized = normalize(answer)
    golds = [normalize(gold) for gold in golden_answers]
    if normalize is normalize_strict:
        return float(any(gold and f" {gold} " in f" {normalized} " for gold in golds))
    return float(any(gold in normalized for gold in golds))


def token_f1(answer: str, golden_answers: Sequence[str], normalize: Normalizer) -> float:
    """The best token F1 with any gold answer, in [0, 1]: harmonic mean of precision and recall over words
    as multisets.

    As HotpotQA's evaluation: when either side is yes, no or noanswer, only equality scores. An empty side
    scores 0.
    """
    normalized = normalize(answer)
    return max((_f1(normalized, normalize(gold)) for gold in golden_answers), default=0.0)


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _CLOSED_CLASS_ANSWERS or gold in _CLOSED_CLASS_ANSWERS):
        return 0.0
    answer_words, gold_words = answer.split(), gold.split()
    num_common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * num_common / (len(answer_words) + len(gold_words)) if num_common else 0.0


AnswerScore = Callable[[str, Sequence[str], Normalizer], float]
ANSWER_SCORES: dict[str, AnswerScore] = {"em": exact_match, "f1": token_f1, "sub_em": sub_em}


RolloutScore = Callable[[Rollout, Question], float]


def own_scores(config: RewardConfig) -> dict[str, RolloutScore]:
    """reward.own by name, each tried once. Raises ConfigError for one that does not fit, or reward.answer."""
    if isinstance(config.answer, OwnFunction):
        _own_score(config.answer, "reward.answer")
    return {name: _own_score(function, f"reward.own.{name}") for name, function in config.own.items()}


@functools.cache
def _own_score(name: OwnFunction, key: str) -> RolloutScore:
    seam: Seam[RolloutScore] = Seam(
        key=key,
        form="score(rollout: Rollout, question: Question) -> float",
        table={},
        example=_example_of_score,
        fault=lambda number, *_: fault_of_number(number),
    )
    return seam.choose(name)


def _example_of_score() -> tuple[Rollout, Question]:
    group = example_groups()[0]
    return dataclasses.replace(group.rollouts[0], scores=None), group.question


def completion_is_well_formed(text: str, protocol: Protocol) -> bool:
    """True for: at most one note span (where the protocol has them), at most one think span, then exactly
    one span of a search, another tool or an answer, white space around them, nothing else.

    `text` is one decoded completion without the end-of-sequence token. No control tag may occur inside a
    span. Beside native calls thoughts stand free before the call, which must be a readable one, or the
    answer.
    """
    body = text.strip()
    for opening, closing in filter(None, (protocol.note_tags, protocol.think_tags)):
        if body.startswith(opening):
            thought, closed, body = body.removeprefix(opening).partition(closing)
            if not closed or _holds_tag(thought, protocol):
                return False
            body = body.strip()
    acts = (*protocol.action_tags.values(), protocol.answer_tags)
    if protocol.native_calls:
        begins = min((body.find(opening) for opening, _ in acts if opening in body), default=0)
        if _holds_tag(body[:begins], protocol):
            return False
        body = body[begins:]
    for opening, closing in acts:
        if body.startswith(opening) and body.endswith(closing):
            content = body[len(opening) : -len(closing)]
            is_sound = bool(content.strip()) and not _holds_tag(content, protocol)
            is_call = protocol.native_calls and opening != protocol.answer_tags[0]
            return is_sound and (not is_call or _is_readable(content, protocol))
    return False


def _is_readable(call: str, protocol: Protocol) -> bool:
    try:
        return bool(read_call(call.encode(), protocol.call_arguments).text.strip())
    except UnreadableCallError:
        return False


def _holds_tag(text: str, protocol: Protocol) -> bool:
    return any(tag in text for tag in protocol.control_tags)


def format_valid(rollout: Rollout) -> float:
    """1.0 when every turn is well-formed, and in every attempt all but the last act, and the last one answers;
    else 0.0."""
    if rollout.stop_reason is not StopReason.ANSWERED or not rollout.answer or not rollout.turns:
        return 0.0
    in_order = all(
        all(turn.action is not None for turn in before) and last.action is None
        for *before, last in rollout.attempts
    )
    return float(in_order and all(turn.well_formed for turn in rollout.turns))


def hop_hit_rate(rollout: Rollout, supporting: Sequence[Sequence[str]]) -> float | None:
    """Share of hops of which any serving passage was retrieved in any turn; None when the hops are
    unknown."""
    if not supporting:
        return None
    found = {hit.passage.id for turn in rollout.turns for hit in turn.hits}
    return sum(not found.isdisjoint(passages) for passages in supporting) / len(supporting)


def score_rollout(
    rollout: Rollout, group: RolloutGroup, config: RewardConfig, verdict: float | None = None
) -> Scores:
    """What one rollout earned, by the shape that the configuration names (reward_shapes.py). No answer scores
    0. verdict: the judge's, where there is one."""
    normalize = NORMALIZERS[config.normalization]
    golds = group.question.golden_answers
    answer = dict.fromkeys(ANSWER_SCORES, 0.0)
    if rollout.answer is not None:
        answer = {name: compare(rollout.answer, golds, normalize) for name, compare in ANSWER_SCORES.items()}
    judged = {} if verdict is None else {"judge": verdict}
    valid = format_valid(rollout)
    parts = RewardParts(
        answer=_answer_score(rollout, group.question, judged | answer, config),
        **answer,
        answer_words=len((rollout.answer or "").split()),
        has_answer=rollout.answer is not None,
        format_valid=valid,
        num_searches=len(rollout.queries),
        found_gold=lambda: _found_gold(rollout, golds, normalize),
        noted_gold=lambda: _holds_gold(" ".join(turn.note for turn in rollout.turns), golds, normalize),
        num_sampled=sum(len(turn.completion_ids) for turn in rollout.turns),
    )
    penalty = overlong_penalty(parts.num_sampled, config)
    return Scores(
        reward=REWARD_SHAPES[config.shape](parts, config) + penalty,
        em=answer["em"],
        f1=answer["f1"],
        format_valid=valid,
        hop_hit_rate=hop_hit_rate(rollout, group.question.supporting),
        em_by_attempt=_em_by_attempt(rollout, golds, normalize),
        own=judged | {name: own(rollout, group.question) for name, own in own_scores(config).items()},
    )


def _answer_score(
    rollout: Rollout, question: Question, known: Mapping[str, float], config: RewardConfig
) -> float:
    if isinstance(config.answer, OwnFunction):
        return _own_score(config.answer, "reward.answer")(rollout, question)
    return known[config.answer]


def _em_by_attempt(
    rollout: Rollout, golden_answers: Sequence[str], normalize: Normalizer
) -> tuple[float, ...]:
    """Exact match of every attempt's answer, 0 without one; empty where there is one attempt."""
    answers = [turns[-1].answer for turns in rollout.attempts]
    if len(answers) < 2:
        return ()
    return tuple(
        0.0 if answer is None else exact_match(answer, golden_answers, normalize) for answer in answers
    )


def _found_gold(rollout: Rollout, golden_answers: Sequence[str], normalize: Normalizer) -> bool:
    """Some passage that a search found holds a gold answer."""
    passages = (hit.passage for turn in rollout.turns for hit in turn.hits)
    return any(_holds_gold(f"{p.title} {p.text}", golden_answers, normalize) for p in passages)


def _holds_gold(text: str, golden_answers: Sequence[str], normalize: Normalizer) -> bool:
    """As sub_em has it; a gold answer of which nothing is left counts as held by none."""
    golds = [gold for gold in golden_answers if normalize(gold)]
    return sub_em(text, golds, normalize) == 1.0


def score(groups: Sequence[RolloutGroup], config: RewardConfig) -> list[RolloutGroup]:
    """The groups with `Rollout.scores` filled in, infrastructure failures (which `RolloutGroup.usable`
    leaves out) included. An answer of which the judge says nothing makes its rollout no data (judge_failed). Raises
    RolloutError when there are too many of these."""
    verdicts = iter(_verdicts(groups, config))
    return [
        dataclasses.replace(
            group,
            rollouts=tuple(_scored(r, group, config, verdict=next(verdicts)) for r in group.rollouts),
        )
        for group in groups
    ]


def _scored(rollout: Rollout, group: RolloutGroup, config: RewardConfig, *, verdict: float | None) -> Rollout:
    if config.judge is not None and verdict is None:
        failed = rollout.stop_reason if rollout.stop_reason.is_infrastructure else StopReason.JUDGE_FAILED
        rollout, verdict = dataclasses.replace(rollout, stop_reason=failed), 0.0  # of no data
    return dataclasses.replace(rollout, scores=score_rollout(rollout, group, config, verdict))


def _verdicts(groups: Sequence[RolloutGroup], config: RewardConfig) -> list[float | None]:
    """The judge's, rollout by rollout; 0.0 without an answer. None of each where there is no judge."""
    rollouts = [(group.question, rollout) for group in groups for rollout in group.rollouts]
    if config.judge is None:
        return [None] * len(rollouts)
    answers = [
        GivenAnswer(question=asked.text, golden_answers=asked.golden_answers, answer=rollout.answer)
        for asked, rollout in rollouts
        if rollout.answer is not None
    ]
    judge = _judge(config.judge)
    verdicts = judge.verdicts(answers)
    without = sum(one is None for one in verdicts.found)
    if without > config.judge.max_failed_share * len(answers):
        raise RolloutError(
            f"reward.judge: {without} of {len(answers)} answers could not be judged, expected at most"
            f" {config.judge.max_failed_share:.0%} (reward.judge.max_failed_share); the first cause:"
            f" {(*verdicts.failures, 'settled before')[0]}; what was judged is kept: start the run again"
        )
    found = iter(judge.settle(answers) if without else verdicts.found)
    return [0.0 if rollout.answer is None else next(found) for _, rollout in rollouts]


@functools.cache
def _judge(config: RewardJudgeConfig) -> AnswerJudge:
    return AnswerJudge(config, Path(config.store))
