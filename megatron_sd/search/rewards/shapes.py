"""How a rollout's parts (its answer's score, its form, what it found) make its reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_sd.config import RewardConfig

MOST_ANSWER_WORDS = 10  # R1-Searcher's


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """What a reward is made of. answer: the score that reward.answer names; em, f1, sub_em: all of them.
    answer_words: of the answer, 0 without one. has_answer: an answer was closed. format_valid: 1.0 for a valid
    form. num_searches: served ones. found_gold, noted_gold: whether a gold answer stands in what a search
    found, or in the policy's own notes, looked for when it is asked. num_sampled: tokens that the policy
    sampled."""

    answer: float
    em: float
    f1: float
    sub_em: float
    answer_words: int
    has_answer: bool
    format_valid: float
    num_searches: int
    found_gold: Callable[[], bool]
    noted_gold: Callable[[], bool]
    num_sampled: int


def plain(parts: RewardParts, config: RewardConfig) -> float:
    """The answer's score, plus format_weight for a valid form."""
    return parts.answer + config.format_weight * parts.format_valid


def structured(parts: RewardParts, config: RewardConfig) -> float:
    """Search-R1's reward with structure (v0.3, qa_em_format), a substitution and no sum: an exact match earns
    1, or 1 - structure in a broken form; any other rollout of valid form `structure`, plus `retrieval` where
    a gold answer was found; a wrong answer in a broken form `final`; anything else 0."""
    if parts.em:
        return 1.0 if parts.format_valid else 1.0 - config.structure
    if parts.format_valid:
        is_paid = config.retrieval > 0.0 and parts.found_gold()
        return config.structure + (config.retrieval if is_paid else 0.0)
    return config.final if parts.has_answer else 0.0


def r1_searcher(parts: RewardParts, config: RewardConfig) -> float:
    """Token F1, less 2 for any breach of the form, an answer of more than 10 words among them (R1-Searcher,
    zero reward). Their checks of single words and scripts are left out."""
    is_sound = parts.format_valid and parts.answer_words <= MOST_ANSWER_WORDS
    return parts.f1 - (0.0 if is_sound else 2.0)


def r1_searcher_first(parts: RewardParts, config: RewardConfig) -> float:
    """1 for an answer that holds a gold one, else -1, plus .5 for a search, plus .5 for a valid form
    (R1-Searcher, first stage, as its code has it; its text leaves out the first term)."""
    right = 1.0 if parts.sub_em else -1.0
    return right + 0.5 * (parts.num_searches > 0) + 0.5 * bool(parts.format_valid)


def research(parts: RewardParts, config: RewardConfig) -> float:
    """0 in a broken form; else token F1, or .1 where that is 0 (ReSearch)."""
    if not parts.format_valid:
        return 0.0
    return parts.f1 or 0.1


def autorefine(parts: RewardParts, config: RewardConfig) -> float:
    """0 without an answer; else token F1; where that is 0, .1 if the notes hold a gold answer (AutoRefine)."""
    if not parts.has_answer:
        return 0.0
    return parts.f1 or (0.1 if parts.noted_gold() else 0.0)


def overlong_penalty(num_sampled: int, config: RewardConfig) -> float:
    """0 up to overlong_limit - overlong_buffer sampled tokens, then down to -1 at overlong_limit (DAPO, equation
    13)."""
    if config.overlong_buffer == 0:
        return 0.0
    beyond = num_sampled - (config.overlong_limit - config.overlong_buffer)
    return -max(beyond, 0) / config.overlong_buffer


RewardShape = Callable[[RewardParts, RewardConfig], float]
REWARD_SHAPES: Mapping[str, RewardShape] = {
    "plain": plain,
    "structured": structured,
    "r1_searcher": r1_searcher,
    "r1_searcher_first": r1_searcher_first,
    "research": research,
    "autorefine": autorefine,
}
