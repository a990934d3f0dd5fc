"""Which values of the configuration (config/) go together; ranges.py: what each may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_sd.config.distill_checks import check_distill
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sd.config.loss import AdvantageConfig, PolicyLossConfig
    from megatron_sd.config.rollout import RewardConfig
    from megatron_sd.config.run import Config, DataConfig, LogConfig
    from megatron_sd.config.update import UpdateConfig


SCORES = ("reward", "em", "f1", "format_valid", "hop_hit_rate")  # fields of records.Scores


def check(config: Config) -> None:
    """Raise ConfigError for a value out of range, and for values that do not go together."""
    check_ranges(config)
    check_distill(config)
    if (
        config.rollout.max_lag
        and config.rollout.engine == "vllm"
        and config.rollout.vllm.placement == "colocated"
    ):
        raise ConfigError(
            f"rollout.max_lag: found {config.rollout.max_lag} with rollout.vllm.placement colocated, expected"
            " 0, since such ranks sample and train in turns; or placement process or server"
        )
    if config.rollout.max_lag and config.rollout.keep_groups != "all":
        raise ConfigError(
            f"rollout.keep_groups: found {config.rollout.keep_groups} with rollout.max_lag"
            f" {config.rollout.max_lag}, expected all, or max_lag 0: what is kept decides what is sampled next"
        )
    if config.rollout.keep_groups == "with_spread" and config.rollout.group_size == 1:
        raise ConfigError(
            "rollout.keep_groups: found with_spread with rollout.group_size 1, expected all, or a larger group:"
            " one rollout is never right and wrong"
        )
    _check_sinks(config.log)
    _check_mix(config.data)
    _check_attempts(config)
    _check_reward(config.reward)
    _check_terms(config.advantage, config.reward)
    _check_policy_loss(config.policy_loss)
    _check_reading(config)
    _check_offload(config)
    if config.update.tensor_parallel_size > 1:
        _check_tensor_parallel(config)
    if config.update.pack_sequences and config.update.sequence_parallel_size > 1:
        raise ConfigError(
            "update.pack_sequences: found true with update.sequence_parallel_size above 1, expected one of"
            " the two"
        )
    if config.model.attention == "varlen" and not config.update.pack_sequences:
        raise ConfigError(
            "model.attention: found varlen without update.pack_sequences, expected both, or sdpa"
        )
    if config.update.sequence_parallel_size > 1 and config.policy_loss.ratio != "token":
        raise ConfigError(
            f"policy_loss.ratio: found {config.policy_loss.ratio} with update.sequence_parallel_size above 1,"
            " where no rank has all tokens of a sequence, expected token"
        )
    if config.update.sequence_parallel_size > 1 and config.model.attention != "sdpa":
        found = f"found {config.model.attention} with update.sequence_parallel_size above 1"
        raise ConfigError(f"model.attention: {found}, expected sdpa")
    if config.model.lora.rank and config.publish.source == "master":
        raise ConfigError(
            "publish.source: found master with model.lora.rank above 0, expected parameters: W has no master"
            " then"
        )


def _check_sinks(log: LogConfig) -> None:
    repeated = sorted(name for name in set(log.sinks) if log.sinks.count(name) > 1)
    if repeated:
        raise ConfigError(f"log.sinks: found {repeated[0]} more than once, expected each sink once")


def _check_mix(data: DataConfig) -> None:
    for name, own in data.mix.items():
        if not (0 < own.weight < math.inf):
            raise ConfigError(f"data.mix.{name}.weight: found {own.weight}, expected more than 0")
    if data.pass_range[0] > data.pass_range[1]:
        raise ConfigError(f"data.pass_range: found {list(data.pass_range)}, expected the lower share first")
    if data.pass_range != (0.0, 1.0) and data.pass_rates is None:
        raise ConfigError(
            f"data.pass_range: found {list(data.pass_range)} without data.pass_rates, expected the samples.jsonl of"
            " an evaluation of these questions"
        )


def _check_attempts(config: Config) -> None:
    own = config.rollout
    if own.attempts == 1:
        return
    turn = own.max_turn_tokens + own.max_observation_tokens
    needed = own.attempts * (own.max_search_turns + 1) * turn
    if own.max_rollout_tokens < needed:
        raise ConfigError(
            f"rollout.max_rollout_tokens: found {own.max_rollout_tokens} with rollout.attempts {own.attempts},"
            f" expected at least {needed}: attempts x (max_search_turns + 1) x (max_turn_tokens +"
            " max_observation_tokens), since all attempts share one context"
        )


def _check_reward(reward: RewardConfig) -> None:
    if reward.overlong_buffer > reward.overlong_limit:
        raise ConfigError(
            f"reward.overlong_limit: found {reward.overlong_limit} with reward.overlong_buffer"
            f" {reward.overlong_buffer}, expected at least as many sampled tokens: rollouts lose 1 there"
        )


def _check_terms(advantage: AdvantageConfig, reward: RewardConfig) -> None:
    unusable = [name for name in reward.own if name in SCORES or not name.isidentifier()]
    if unusable:
        raise ConfigError(
            f"reward.own: found the name {unusable[0]!r}, expected letters, digits and _, and none of"
            f" {', '.join(SCORES)}"
        )
    known = (*SCORES, *reward.own)
    unknown = sorted(set(advantage.terms) - set(known))
    if unknown or not any(advantage.terms.values()):
        found = f"{', '.join(unknown)}, which nobody scores" if unknown else f"{advantage.terms}"
        raise ConfigError(f"advantage.terms: found {found}, expected weights of some of {', '.join(known)}")


def _check_policy_loss(loss: PolicyLossConfig) -> None:
    """What bounds ratios: the cap, or the clips, which it takes the place of."""
    if loss.dual_clip is not None and not loss.dual_clip > 1.0:
        raise ConfigError(
            f"policy_loss.dual_clip: found {loss.dual_clip}, expected more than 1: a loss at a ratio of 1 is one"
            " advantage already"
        )
    if loss.ratio != "token" and loss.objective != "clipped":
        raise ConfigError(
            f"policy_loss.ratio: found {loss.ratio} with policy_loss.objective {loss.objective}, which has no"
            " ratio, expected token"
        )
    for key in ("clip_high", "dual_clip"):
        if loss.importance_cap is not None and getattr(loss, key) is not None:
            raise ConfigError(
                f"policy_loss.{key}: found {getattr(loss, key)} with policy_loss.importance_cap"
                f" {loss.importance_cap}, expected one of the two: the cap takes the place of all clips"
            )


def _check_reading(config: Config) -> None:
    """What is read before a step's first update (algorithm/refinements.py), and in how many steps."""
    update, loss, advantage = config.update, config.policy_loss, config.advantage
    if update.minibatches > config.rollout.questions_per_step:
        raise ConfigError(
            f"update.minibatches: found {update.minibatches} with rollout.questions_per_step"
            f" {config.rollout.questions_per_step}, expected at most as many: a batch is cut by question"
        )
    if advantage.modulation != "none" and config.distill.block == "none":
        raise ConfigError(
            f"advantage.modulation: found {advantage.modulation} with distill.block none, expected a block:"
            " its teacher says how likely a query is in hindsight"
        )
    if advantage.modulation == "minillm" and config.distill.scope != "all":
        raise ConfigError(
            f"distill.scope: found {config.distill.scope} with advantage.modulation minillm, expected all: its"
            " returns are over every sampled token"
        )
    if advantage.modulation == "hca" and config.distill.block != "single":
        raise ConfigError(
            f"distill.block: found {config.distill.block} with advantage.modulation hca, expected single: the"
            " teacher must know how this rollout ended, and nothing of the others"
        )
    _check_critic(config)
    asks = {
        "advantage.estimator": (advantage.estimator, advantage.estimator == "gae"),
        "update.minibatches times update.epochs": (update.updates_per_batch, update.updates_per_batch > 1),
        "policy_loss.engine_cap": (loss.engine_cap, loss.engine_cap is not None),
        "policy_loss.top_entropy_share": (loss.top_entropy_share, loss.top_entropy_share < 1.0),
        "advantage.modulation": (advantage.modulation, advantage.modulation != "none"),
    }
    for key, (found, is_asked) in asks.items():
        if is_asked and update.sequence_parallel_size > 1:
            raise ConfigError(
                f"{key}: found {found} with update.sequence_parallel_size above 1, expected one of the two: the"
                " batch is read once more, by ranks that each have all rows of a sequence"
            )


# blocks that show what other rollouts of the question did
OF_SIBLINGS = (
    *("paper", "leave_one_out", "only_correct", "only_correct_shuffled", "no_labels", "shuffled", "inverted"),
    *("flat_pool", "turn_causal", "with_documents", "solution", "settled", "settled_shuffled"),
)


def _check_critic(config: Config) -> None:
    """What PPO's estimator goes with, and what goes with it alone."""
    advantage, loss, rollout, block = (
        config.advantage,
        config.policy_loss,
        config.rollout,
        config.distill.block,
    )
    if advantage.estimator != "gae":
        if loss.kl == "k1_reward":
            raise ConfigError(
                f"policy_loss.kl: found k1_reward with advantage.estimator {advantage.estimator}, expected"
                " estimator gae, which has a reward for each token, or a kl that is a loss (k3, k2, k3_ratio)"
            )
        if advantage.turn_rewards != "none":
            raise ConfigError(
                f"advantage.turn_rewards: found {advantage.turn_rewards} with advantage.estimator"
                f" {advantage.estimator}, expected none, or estimator gae; without a critic use estimator"
                " stepsearch"
            )
        return
    if rollout.group_size == 1 and block in OF_SIBLINGS:
        raise ConfigError(
            f"distill.block: found {block} with rollout.group_size 1, expected none, or a block that no other"
            " rollout of the question is needed for (single, reference, plain, dummy); or a larger group"
        )
    if advantage.modulation != "none":
        raise ConfigError(
            f"advantage.modulation: found {advantage.modulation} with advantage.estimator gae, expected none: a"
            " turn is modulated as a whole, and gae's tokens have advantages of their own"
        )


def _check_offload(config: Config) -> None:
    update = config.update
    lowest = 3 if "nvme" in update.offload_optimizer or update.offload_parameters != "none" else 1
    wanted = {"offload_optimizer": update.offload_optimizer, "offload_parameters": update.offload_parameters}
    for name, place in wanted.items():
        if place != "none" and update.zero_stage < lowest:
            raise ConfigError(
                f"update.{name}: found {place} at zero_stage {update.zero_stage}, expected stage {lowest} or"
                " above"
            )
    if (update.offload_optimizer == "nvme") != (update.nvme_path is not None):
        raise ConfigError(
            f"update.nvme_path: found {update.nvme_path!r} with offload_optimizer {update.offload_optimizer},"
            " expected a directory on a local disk with nvme, and none without"
        )


def _check_tensor_parallel(config: Config) -> None:
    """What tensor-parallel training does not do yet, or cannot."""
    update, distill = config.update, config.distill
    on_vllm, served = config.rollout.engine == "vllm", config.rollout.vllm
    wanted = {  # key: (found, fits, expected)
        "update.sequence_parallel_size": (
            update.sequence_parallel_size,
            update.sequence_parallel_size == 1,
            "1",
        ),
        "update.zero_stage": (update.zero_stage, update.zero_stage > 0, "1 to 3"),
        "advantage.estimator": (
            config.advantage.estimator,
            config.advantage.estimator != "gae",
            "one without a critic",
        ),
        "update.offload_parameters": (update.offload_parameters, update.offload_parameters == "none", "none"),
        "update.offload_optimizer": (
            update.offload_optimizer,
            update.offload_optimizer != "nvme",
            "none or cpu",
        ),
        "model.lora.rank": (config.model.lora.rank, config.model.lora.rank == 0, "0"),
        "distill.teacher": (distill.teacher, distill.teacher == "live", "live"),
        "distill.top_k": (distill.top_k, distill.top_k is None, "none, the full vocabulary"),
        "distill.entry_clip": (distill.entry_clip, distill.entry_clip is None, "none"),
        "distill.divergence": (
            distill.divergence,
            distill.divergence != "mse",
            "jsd, forward_kl or reverse_kl",
        ),
        "distill.target": (distill.target, distill.target != "shuffled_vocabulary", "teacher or uniform"),
        "rollout.vllm.publish": (served.publish, not (on_vllm and served.publishes_shards), "gather"),
        "rollout.vllm.placement": (
            served.placement,
            not on_vllm or served.placement != "colocated",
            "process or server",
        ),
    }
    for key, (found, fits, expected) in wanted.items():
        if not fits:
            raise ConfigError(
                f"{key}: found {found} with update.tensor_parallel_size above 1, expected {expected}"
            )


def check_layer_cuts(update: UpdateConfig, model: Mapping[str, Any]) -> None:
    """Raise ConfigError for a model (its config.json) whose layers cannot be cut into equal parts for
    tensor-parallel ranks."""
    size, names = (
        update.tensor_parallel_size,
        ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    )
    sizes = {name: model[name] for name in names if name in model}
    if any(value % size for value in sizes.values()):
        raise ConfigError(
            f"update.tensor_parallel_size: found {size} for a model of {sizes}, expected a divisor of each"
        )


def check_sequence_heads(update: UpdateConfig, *, num_heads: int, num_kv_heads: int) -> None:
    """Raise ConfigError for a model whose attention heads cannot be dealt to the ranks that share a
    sequence."""
    size = update.sequence_parallel_size
    if num_heads % size or (num_kv_heads % size and size % num_kv_heads):
        raise ConfigError(
            f"update.sequence_parallel_size: found {size} for a model of {num_heads} attention and"
            f" {num_kv_heads} key-value heads, expected a divisor of the first that divides the second or is"
            " a multiple of it"
        )


def engine_reads_policy(config: Config, num_ranks: int) -> bool:
    """The embedded engine can read the policy's weights where they are: one rank holds them all, and
    nothing samples while they change."""
    is_alone = num_ranks == 1 and config.update.zero_stage == 3 and config.update.offload_parameters == "none"
    return is_alone and config.rollout.engine == "torch" and config.rollout.max_lag == 0


def engine_rests(config: Config, num_ranks: int) -> bool:
    """The embedded engine has a copy of the weights, which nobody asks while the policy is updated."""
    has_copy = config.rollout.engine == "torch" and not engine_reads_policy(config, num_ranks)
    return has_copy and config.rollout.max_lag == 0


def settings_of_hops(config: Config) -> list[str]:
    """Those of this run that look at which passages serve a question's hops."""
    found = {
        "advantage.estimator stepsearch": config.advantage.estimator == "stepsearch",
        "advantage.turn_rewards stepsearch": config.advantage.turn_rewards == "stepsearch",
        "distill.queries evidence": config.distill.queries == "evidence",
    }
    return [setting for setting, is_chosen in found.items() if is_chosen]
