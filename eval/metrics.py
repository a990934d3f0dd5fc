"""What one rollout of an evaluation earned and did, as pure functions; the comparison of answers is
search/rewards/answers.py's."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import regex

from megatron_sd.records import Hit, Question, Rollout
from megatron_sd.search.rewards.answers import ANSWER_SCORES, NORMALIZERS
from megatron_sd.search.rewards.reward import hop_hit_rate

ANSWER_FIGURES = {
    f"{name}{suffix}": (compare, NORMALIZERS[normalization])
    for suffix, normalization in (("", "search_r1"), ("_strict", "strict"))
    for name, compare in ANSWER_SCORES.items()
}
# Means over rollouts of these are shares of yes or no.
PROPORTIONS = ("em", "em_strict", "sub_em", "sub_em_strict", "answer_in_passages", "format_valid", "judge")

_WORD_OR_MARK = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def rollout_figures(
    rollout: Rollout, question: Question, format_valid: Callable[[Rollout], float]
) -> dict[str, float | None]:
    """All figures of one rollout. An infrastructure failure is no data and has no figures.

    em, f1, sub_em and the same with _strict: of `Rollout.answer`, 0 without an answer. answer_in_passages,
    supporting_recall: over the passages of all searches, 0 without a search; supporting_recall is None
    where the question names no passage. searches: how many. turns: completions. completion_tokens: sampled;
    observation_tokens: read after the prompt. format_valid: by the function. em@1, em@2, ...: of each attempt's
    answer, where a rollout makes several; em@2 costs the tokens of two. Of a scored rollout further those
    of reward.own.
    """
    if rollout.stop_reason.is_infrastructure:
        return {}
    golds = question.golden_answers
    figures: dict[str, float | None] = {
        name: 0.0 if rollout.answer is None else compare(rollout.answer, golds, normalize)
        for name, (compare, normalize) in ANSWER_FIGURES.items()
    }
    hits = [hit for turn in rollout.turns for hit in turn.hits]
    answers = [turns[-1].answer for turns in rollout.attempts]
    compare, normalize = ANSWER_FIGURES["em"]
    for number, answer in enumerate(answers if len(answers) > 1 else [], start=1):
        figures[f"em@{number}"] = 0.0 if answer is None else compare(answer, golds, normalize)
    return figures | {
        "answer_in_passages": answer_in_passages(hits, golds),
        "supporting_recall": hop_hit_rate(rollout, question.supporting),
        "searches": float(len(rollout.queries)),
        "turns": float(sum(bool(turn.completion_ids) for turn in rollout.turns)),
        "completion_tokens": float(sum(len(turn.completion_ids) for turn in rollout.turns)),
        "observation_tokens": float(sum(len(turn.observation_ids) for turn in rollout.turns)),
        "format_valid": format_valid(rollout),
        **(rollout.scores.own if rollout.scores is not None else {}),
    }


def answered_in_form(rollout: Rollout) -> float:
    """1.0 when the rollout ended with a non-empty answer and every completion did what its prompt asked
    for."""
    return float(bool(rollout.answer) and all(turn.well_formed for turn in rollout.turns))


def answer_in_passages(hits: Sequence[Hit], golden_answers: Sequence[str]) -> float:
    """1.0 when any passage's text holds a gold answer as a run of whole words (DPR's `has_answer`):
    decomposed, lower case, punctuation marks counting as words of their own."""
    golds = [words for gold in golden_answers if (words := _words(gold))]
    return float(any(_holds_run(_words(hit.passage.text), gold) for hit in hits for gold in golds))


def holds_answer(text: str, answer: str) -> bool:
    """Whether a text holds an answer, read as answer_in_passages reads passages."""
    words = _words(answer)
    return bool(words) and _holds_run(_words(text), words)


def _words(text: str) -> list[str]:
    return _WORD_OR_MARK.findall(unicodedata.normalize("NFD", text).lower())


def _holds_run(words: Sequence[str], run: Sequence[str]) -> bool:
    return any(
        words[start : start + len(run)] == run
        for start in range(len(words) - len(run) + 1)
        if words[start] == run[0]
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k of the samples, drawn without replacement, is right: 1 - C(n-c, k) /
    C(n, k), the unbiased estimate of pass@k (Chen et al., 2021). Raises ValueError unless 1 <= k <=
    num_samples."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples; expected k from 1 to {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_figures(correct: Sequence[float]) -> Mapping[str, float]:
    """pass@1, 2, 4, ... up to the number of samples of one question, and pass@ all of them; none for a
    single sample."""
    num_samples, num_correct = len(correct), sum(value == 1.0 for value in correct)
    if num_samples < 2:
        return {}
    depths = {2**power for power in range(num_samples.bit_length())} | {num_samples}
    return {f"pass@{k}": pass_at_k(num_samples, num_correct, k) for k in sorted(depths)}
