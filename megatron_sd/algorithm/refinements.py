"""What the policy says of a step's rows before the step's first update, and what is made of it: the ratios'
denominators, advantages from a critic's values, and advantages weighed by row or by turn.

A refinement gets this rank's microbatches, each with its reading, and gives them back with other numbers in
their rows. What depends on more rows than a rank has is summed over ranks by `everywhere`. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from megatron_sd.algorithm.advantages.gae import WHITEN_EPSILON, generalized, token_rewards
from megatron_sd.algorithm.advantages.table import FROM_VALUES
from megatron_sd.config import AdvantageConfig, CriticConfig, PolicyLossConfig, UpdateConfig
from megatron_sd.records import Microbatch

MOST_LOG_RATIO = 2.0  # of hindsight_credit, nats
MOST_REWARD = 100.0  # of minillm, nats
_NOTHING = np.zeros(0, dtype=np.float32)


class Reading(NamedTuple):
    """Of one microbatch, float32, nats. logprobs, entropies: [R]. teacher_logprobs: [Q], of the tokens at
    the query rows; empty where no teacher was read. values: [R], the critic's; reference_logprobs: [R], the
    start policy's, where a KL is part of the reward; each empty where nobody was asked."""

    logprobs: np.ndarray
    entropies: np.ndarray
    teacher_logprobs: np.ndarray
    values: np.ndarray = _NOTHING
    reference_logprobs: np.ndarray = _NOTHING


class Read(NamedTuple):
    """A microbatch and what the policy says of it."""

    microbatch: Microbatch
    reading: Reading


Everywhere = Callable[[Any], Sequence[Any]]  # an object of this rank -> those of all ranks, in rank order
Refinement = Callable[[Sequence[Read], Everywhere], list[Microbatch]]
# (advantages [T], mean of log teacher - log policy [T], the same standardised in its group [T]) of turns that
# have query tokens, and the configuration -> their advantages
Modulation = Callable[..., np.ndarray]


def refinements(
    policy_loss: PolicyLossConfig, advantage: AdvantageConfig, update: UpdateConfig, critic: CriticConfig
) -> tuple[Refinement, ...]:
    """Those that the configuration asks for, in order; without one nothing is read."""
    chosen: list[Refinement] = []
    if advantage.estimator in FROM_VALUES:
        kl_weight = policy_loss.kl_weight if policy_loss.kl == "k1_reward" else 0.0
        chosen.append(partial(with_values, config=critic, kl_weight=kl_weight))
    if update.updates_per_batch > 1 or policy_loss.engine_cap is not None:
        chosen.append(partial(with_old_logprobs, engine_cap=policy_loss.engine_cap))
    if advantage.modulation != "none":
        chosen.append(partial(MODULATIONS[advantage.modulation], config=advantage))
    if policy_loss.top_entropy_share < 1.0:
        chosen.append(partial(most_uncertain, share=policy_loss.top_entropy_share))
    return tuple(chosen)


def with_values(
    reads: Sequence[Read], everywhere: Everywhere, *, config: CriticConfig, kl_weight: float
) -> list[Microbatch]:
    """Advantages, returns and old values from what turns earned (until now the rows' advantages) and a
    critic's values (advantages/gae.py).

    kl_weight: each token loses so many times log pi_old - log pi_ref. Returns are advantages plus values;
    then the advantages are whitened over the step's sampled tokens, (A - mean) / sqrt(unbiased variance +
    1e-8), as Search-R1 and verl do."""
    own = [_advantages(m, reading, config, kl_weight) for m, reading in reads]
    return [
        replace(
            m,
            advantages=white.astype(np.float32),
            returns=(advantages + reading.values).astype(np.float32),
            old_values=reading.values,
        )
        for (m, reading), advantages, white in zip(reads, own, whitened(own, everywhere), strict=True)
    ]


def whitened(parts: Sequence[np.ndarray], everywhere: Everywhere) -> list[np.ndarray]:
    """This rank's numbers, less the mean and over sqrt(unbiased variance + 1e-8) of all ranks'."""
    flat = np.concatenate([np.zeros(0), *parts])
    count, total = np.sum(everywhere(np.array([len(flat), flat.sum()])), axis=0)
    mean = total / max(count, 1.0)
    squares = sum(everywhere(float(((flat - mean) ** 2).sum())))
    deviation = np.sqrt(squares / max(count - 1.0, 1.0) + WHITEN_EPSILON)
    return [(part - mean) / deviation for part in parts]


def _by_rollout(rollouts: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """The numbers of rows that belong to `rollouts`, a part a rollout, whose rows follow one another."""
    return np.split(numbers, np.flatnonzero(np.diff(rollouts)) + 1)


def _advantages(m: Microbatch, reading: Reading, config: CriticConfig, kl_weight: float) -> np.ndarray:
    """[R] float64, rollout by rollout."""
    rewards, values = token_rewards(m.advantages, m.turns), reading.values.astype(np.float64)
    if kl_weight:
        rewards = rewards - kl_weight * (reading.logprobs.astype(np.float64) - reading.reference_logprobs)
    parts = zip(_by_rollout(m.rollouts, rewards), _by_rollout(m.rollouts, values), strict=True)
    return np.concatenate([generalized(*part, gamma=config.gamma, lam=config.lam) for part in parts])


def with_old_logprobs(
    reads: Sequence[Read], _: Everywhere, *, engine_cap: float | None = None
) -> list[Microbatch]:
    """Ratios against this reading instead of the engine's log-probabilities, which would count the engine's
    noise as a move of the policy. engine_cap C: an advantage counts min(pi_old / pi_engine, C) times, for
    the engine did not sample from pi_old (truncated importance sampling; verl: 2)."""
    found = []
    for m, reading in reads:
        advantages = m.advantages
        if engine_cap is not None:
            ratios = np.exp(np.minimum(reading.logprobs - m.rollout_logprobs, np.log(engine_cap)))
            advantages = advantages * ratios.astype(np.float32)
        found.append(replace(m, old_logprobs=reading.logprobs, advantages=advantages))
    return found


def most_uncertain(reads: Sequence[Read], everywhere: Everywhere, *, share: float) -> list[Microbatch]:
    """Advantages of 0 but for the share of the step's sampled tokens with the highest entropy (Wang et al.,
    2025, arXiv 2506.01939; there 0.2)."""
    own = np.concatenate([np.zeros(0, np.float32), *(reading.entropies for _, reading in reads)])
    entropies = np.concatenate(everywhere(own))
    if len(entropies) == 0:
        return [m for m, _ in reads]
    threshold = np.quantile(entropies, 1.0 - share)
    return [
        replace(m, advantages=np.where(reading.entropies >= threshold, m.advantages, np.float32(0.0)))
        for m, reading in reads
    ]


def by_turn(
    reads: Sequence[Read], everywhere: Everywhere, *, modulation: Modulation, config: AdvantageConfig
) -> list[Microbatch]:
    """Advantages of turns with query tokens that a teacher read, by how much likelier it finds them than the
    policy does. Other turns keep theirs.

    d = log teacher - log policy of a query token. A turn's value is the mean of its tokens' d; standardised,
    less the mean and over the sample deviation of d over all query tokens of its question (0 without any).
    """
    gains = [_gains(m, reading) for m, reading in reads]
    moments: dict[int, np.ndarray] = {}
    for own in everywhere(_moments(reads, gains)):
        for group, numbers in own.items():
            moments[group] = moments.get(group, 0.0) + numbers
    return [
        _with_turns(m, own, moments, partial(modulation, config=config)) if len(own) else m
        for (m, _), own in zip(reads, gains, strict=True)
    ]


def _gains(m: Microbatch, reading: Reading) -> np.ndarray:
    """[Q] float64 log teacher - log policy; empty without a teacher's reading."""
    if len(reading.teacher_logprobs) == 0:
        return np.zeros(0)
    return reading.teacher_logprobs.astype(np.float64) - reading.logprobs[m.query_rows]


def _moments(reads: Sequence[Read], gains: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """group -> number, sum and sum of squares of its query tokens' gains on this rank."""
    moments: dict[int, np.ndarray] = {}
    for (m, _), own in zip(reads, gains, strict=True):
        if len(own) == 0:
            continue
        groups = m.groups[m.query_rows]
        for group in np.unique(groups):
            some = own[groups == group]
            moments[int(group)] = moments.get(int(group), 0.0) + np.array(
                [len(some), some.sum(), (some**2).sum()]
            )
    return moments


def _with_turns(
    m: Microbatch, gains: np.ndarray, moments: Mapping[int, np.ndarray], modulation: Callable[..., np.ndarray]
) -> Microbatch:
    turns, first, inverse = np.unique(m.turns[m.query_rows], return_index=True, return_inverse=True)
    values = np.bincount(inverse, gains) / np.bincount(inverse)
    counts, sums, squares = np.array([moments[group] for group in m.groups[m.query_rows][first]]).T
    means = sums / counts
    variances = np.maximum(squares - counts * means**2, 0.0) / np.maximum(counts - 1.0, 1.0)
    deviations = np.sqrt(variances)
    flat = deviations <= 1e-6
    standardised = np.where(flat, 0.0, (values - means) / np.where(flat, 1.0, deviations))
    own = modulation(m.advantages[m.query_rows][first].astype(np.float64), values, standardised)
    places = np.minimum(np.searchsorted(turns, m.turns), len(turns) - 1)
    advantages = np.where(turns[places] == m.turns, own[places], m.advantages)
    return replace(m, advantages=advantages.astype(np.float32))


def turnsight(
    advantages: np.ndarray, values: np.ndarray, standardised: np.ndarray, *, config: AdvantageConfig
) -> np.ndarray:
    """A ((1 - l) + l w) with w = 1 + tanh(sign(A) d) / 2, d standardised (TurnSight, arXiv 2608.04007)."""
    weights = 1.0 + 0.5 * np.tanh(np.sign(advantages) * standardised)
    share = config.modulation_weight
    return advantages * ((1.0 - share) + share * weights)


def hindsight_credit(
    advantages: np.ndarray, values: np.ndarray, standardised: np.ndarray, *, config: AdvantageConfig
) -> np.ndarray:
    """(1 - pi / h) A, with h what the teacher, who was shown how this rollout ended, makes of the whole query
    (Harutyunyan et al., 2019, return form). The log-ratio is a mean over tokens, cut at +-2."""
    return advantages * -np.expm1(np.clip(-values, -MOST_LOG_RATIO, MOST_LOG_RATIO))


def minillm(reads: Sequence[Read], everywhere: Everywhere, *, config: AdvantageConfig) -> list[Microbatch]:
    """Reverse KL by policy gradient (MiniLLM, arXiv 2306.08543, equations 5 and 6, and its length
    normalisation): every distilled token's advantage is its mean discounted return of log teacher - log
    policy, cut at +-100, over the rest of its rollout, whitened over the step. Other tokens have 0."""
    found = [_returns(m, _gains(m, reading), config.discount) for m, reading in reads]
    refined = []
    for (m, _), own in zip(reads, whitened(found, everywhere), strict=True):
        advantages = np.zeros_like(m.advantages)
        advantages[m.query_rows[: len(own)]] = own  # none where no teacher was read
        refined.append(replace(m, advantages=advantages))
    return refined


def _returns(m: Microbatch, gains: np.ndarray, discount: float) -> np.ndarray:
    if len(gains) == 0:
        return gains
    parts = _by_rollout(m.rollouts[m.query_rows], gains)
    return np.concatenate([mean_returns(part, discount) for part in parts])


def mean_returns(rewards: np.ndarray, discount: float) -> np.ndarray:
    """[T] float64: of each token the discounted sum of its own and later rewards, over their number."""
    found, ahead = np.zeros(len(rewards)), 0.0
    for place in reversed(range(len(rewards))):
        ahead = float(np.clip(rewards[place], -MOST_REWARD, MOST_REWARD)) + discount * ahead
        found[place] = ahead / (len(rewards) - place)
    return found


MODULATIONS: Mapping[str, Callable[..., list[Microbatch]]] = {
    "turnsight": partial(by_turn, modulation=turnsight),
    "hca": partial(by_turn, modulation=hindsight_credit),
    "minillm": minillm,
}
