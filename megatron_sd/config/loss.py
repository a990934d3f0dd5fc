"""The losses, and how they are weighed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.config.update import OptimizerConfig

EstimatorName = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_baseline",
    "max_rl",
    "batch_std",
    "gdpo",
    "gigpo",
    "graph_hca",
    "stepsearch",
    "mr_search",
    "gae",
    "one",
]
BlockName = Literal[
    "paper",
    "leave_one_out",
    "single",
    "only_correct",
    "only_correct_shuffled",
    "settled",
    "settled_shuffled",
    "settled_wrong_question",
    "no_labels",
    "shuffled",
    "inverted",
    "flat_pool",
    "wrong_question",
    "dummy",
    "turn_causal",
    "with_documents",
    "solution",
    "reference",
    "plain",
    "none",
]


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """What the tokens of a turn are worth to the policy loss. Settings are read by the estimators that are
    named beside them."""

    # algorithm/advantages/; one: of stored rollouts
    estimator: EstimatorName | OwnFunction = "grpo"
    # what r is made of: weights of a rollout's scores (reward, em, f1, format_valid, hop_hit_rate)
    terms: dict[str, float] = field(default_factory=lambda: {"reward": 1.0})
    # gigpo, graph_hca: a turn earlier, the reward counts so much less; mr_search: an attempt
    # earlier; minillm: a token earlier
    discount: float = 0.95
    weight: float = 1.0  # gigpo, graph_hca: of the turn's own part beside the rollout's
    # gigpo, graph_hca: when turns stand in the same place (algorithm/advantages/states.py)
    state: Literal["seen", "observation", "similar"] = "seen"
    normalize: Literal["mean", "mean_std"] = "mean"  # gigpo: centred, or standardised too
    step_scale: float = 0.6  # stepsearch, turn_rewards: of a search's own reward beside the answer's
    # gae: what a turn earns beside the rollout's reward; stepsearch: step_scale times what its search earns
    turn_rewards: Literal["none", "stepsearch"] = "none"
    # by how much likelier than the policy the teacher of `distill` finds a turn's query, or (minillm) every
    # distilled token (algorithm/refinements.py); costs one more reading of the batch
    modulation: Literal["none", "turnsight", "hca", "minillm"] = "none"
    modulation_weight: float = 0.5  # turnsight: 0 leaves the advantages as they are


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The loss of GRPO and its relatives. `aggregation`: token (mean over all completion tokens of the
    step), rollout (mean of rollout means) or constant (mean of rollout sums, over the most tokens that a
    rollout may sample)."""

    # algorithm/policy_loss.py; likelihood: of stored rollouts
    objective: Literal["clipped", "likelihood"] = "clipped"
    clip: float = 0.2  # of ratios below 1, and above unless clip_high is set
    clip_high: float | None = None  # of ratios above 1; None: as clip (DAPO: 0.28)
    # of negative advantages: bound of the loss, in advantages (verl: 3); None: off
    dual_clip: float | None = None
    # truncated importance sampling: bound on a token's ratio to the engine; None: off
    importance_cap: float | None = None
    kl_weight: float = 1e-3  # of the KL to the start policy; 0 builds no reference policy
    # its estimate (algorithm/policy_loss.py); k1_reward: taken off each token's reward, no loss, with gae
    kl: Literal["k3", "k2", "k3_ratio", "k1_reward"] = "k3"
    aggregation: Literal["token", "rollout", "constant"] = "token"
    # a token's own ratio to what sampled it, or the geometric mean of its rollout's, or of its turn's (GSPO,
    # whose clips are 3e-4 and 4e-4: at 0.2 none binds)
    ratio: Literal["token", "rollout", "turn"] = "token"
    # with a reading before the first update: ratios to that, and advantages times min(old / engine's
    # probability, cap), as the engine samples a little otherwise (verl: 2); None: without the weight
    engine_cap: float | None = None
    top_entropy_share: float = 1.0  # of the step's tokens: only the most uncertain ones have an advantage
    # of the mean entropy of the sampled tokens, which is raised (Search-R1: 0.001)
    entropy_weight: float = 0.0
    weight: float = 1.0  # of this loss, its KL included, beside distill.alpha; 0: distillation alone


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A second whole model that says what each token may still expect (PPO). Read with advantage.estimator
    gae alone."""

    path: str | None = None  # of the model that it starts from; None: model.path
    learning_rate: float = 1e-5  # of its own AdamW
    warmup_steps: int = 15  # optimiser steps of its own
    lam: float = 1.0  # a token later, a temporal difference counts so much less
    gamma: float = 1.0  # a token later, a reward counts so much less
    value_clip: float = 0.5  # an update's move of a value from what it was before the step's first
    warmup_only_steps: int = 0  # first steps in which the policy stays as it is

    @property
    def optimizer(self) -> OptimizerConfig:
        """Its own AdamW, as Search-R1 has it."""
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            max_grad_norm=1.0,
        )


@dataclass(frozen=True, kw_only=True)
class AlphaConfig:
    """Weight of L_SD. fixed: `value` (paper: 1e-3); grad_ratio: adapted to |alpha grad L_SD| = target_ratio
    |grad L_GRPO|."""

    mode: Literal["fixed", "grad_ratio"] = "fixed"  # constant, or adapted to the gradients
    value: float = 1e-3  # of fixed; where grad_ratio begins
    target_ratio: float = 0.2  # of grad_ratio
    warmup_steps: int = 50  # alpha is 0 for the first steps
    max_value: float = 3.0  # of the adapted alpha: beyond it a live teacher feeds back on itself


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Hindsight self-distillation. `block: none` is plain GRPO, bit for bit."""

    block: BlockName | OwnFunction = "paper"  # algorithm/blocks.py
    # where an attempt's line says how it ended
    block_format: Literal["outcome_last", "outcome_first"] = "outcome_last"
    correct_above: float = 0.0  # rho: a rollout is CORRECT when its answer's token F1 exceeds this
    # which groups distil
    gate: Literal["none", "has_correct", "mixed", "reward_spread"] | OwnFunction = "none"
    scope: Literal["query", "all", "first_query", "last_query"] = "query"  # which sampled tokens distil
    # of these, all queries, or those for which the teacher's own greedy query finds passages of more hops
    # (algorithm/evidence.py): one more turn is sampled and searched for each
    queries: Literal["all", "evidence"] = "all"
    # L_SD is the mean over rollouts of the means over their tokens, or the mean over all tokens
    aggregation: Literal["rollout", "token"] = "rollout"
    # of the student (ops/head/targets.py)
    target: Literal["teacher", "uniform", "shuffled_vocabulary"] = "teacher"
    # whose weights read the block: the student's, their average, the start's, another model's
    teacher: Literal["live", "ema", "frozen", "other"] = "live"
    teacher_path: str | None = None  # of the other model, which has the same tokenizer and vocabulary
    ema_decay: float = 0.99  # teacher = decay * teacher + (1 - decay) * student after each step
    # sampled: log student - log teacher of the sampled token, as an advantage is (ops/head/sampled.py)
    divergence: Literal["jsd", "forward_kl", "reverse_kl", "mse", "sampled"] = "jsd"
    beta: float = 0.5  # of jsd alone: 0 < beta < 1
    temperature: float = 1.0  # of both distributions, before they are compared
    scale_by_temperature_squared: bool = False  # the divergence, as Hinton's distillation
    top_k: int | None = None  # None: the full vocabulary; the paper: 50, the teacher's, renormalised
    support: Literal["teacher", "student"] = "teacher"  # with top_k: whose likeliest tokens (SDPO: student)
    tail_bucket: bool = False  # with top_k: all other tokens together are one more event, instead of nothing
    # bound of a vocabulary entry's summand, before they are summed (OPSD's jsd_token_clip: 0.05); None: off.
    # Only summands above it are cut, so a row's divergence may fall below 0: distill/below_zero_share
    entry_clip: float | None = None
    # bound on a token's ratio to the engine, the weight of its divergence (SDFT, SDPO: 2); None: no weight
    importance_cap: float | None = None
    # how they keep their digits in bfloat16
    teacher_logits: Literal["delta", "float32_delta", "float32", "same_dtype"] = "delta"
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    # steps between exact gradient-ratio measurements (each costs two more updates); 0: never
    measure_every: int = 25
