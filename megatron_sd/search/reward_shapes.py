"""How a rollout's parts (its answer's score, its form, what it found) make its reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_sd.config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class RewardParts:
    """What a reward is made of. answer: the score that reward.answer names. em: 1.0 for an exact match.
    has_answer: an answer was closed. format_valid: 1.0 for a valid form. found_gold: whether a gold answer
    stands in what a search found, looked for when it is asked. num_sampled: tokens that the policy sampled."""

    answer: float
    em: float
    has_answer: bool
    format_valid: float
    found_gold: Callable[[], bool]
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


def overlong_penalty(num_sampled: int, config: RewardConfig) -> float:
    """0 up to overlong_limit - overlong_buffer sampled tokens, then down to -1 at overlong_limit (DAPO, equation
    13)."""
    if config.overlong_buffer == 0:
        return 0.0
    beyond = num_sampled - (config.overlong_limit - config.overlong_buffer)
    return -max(beyond, 0) / config.overlong_buffer


RewardShape = Callable[[RewardParts, RewardConfig], float]
REWARD_SHAPES: Mapping[str, RewardShape] = {"plain": plain, "structured": structured}
