"""What values of the configuration (config/) are in range, and which go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_sd.config.distill_checks import check_distill
from megatron_sd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sd.config.loss import PolicyLossConfig
    from megatron_sd.config.rollout import RewardConfig
    from megatron_sd.config.run import Config
    from megatron_sd.config.update import UpdateConfig

_RANGES: dict[str, tuple[str, ...]] = {
    "0 or more": (
        "num_steps",
        "rollout.max_search_turns",
        "reward.format_weight",
        "reward.structure",
        "reward.final",
        "reward.retrieval",
        "reward.overlong_buffer",
        "policy_loss.kl_weight",
        "advantage.weight",
        "advantage.step_scale",
        "distill.measure_every",
        "distill.alpha.value",
        "distill.alpha.warmup_steps",
        "optimizer.weight_decay",
        "optimizer.warmup_steps",
        "optimizer.max_grad_norm",
        "model.lora.rank",
        "checkpoint.every",
        "safety.watchdog_s",
        "safety.max_idle_attempts",
        "safety.spike_sigmas",
        "log.eval_every",
        "log.transcripts_every",
        "log.transcripts_per_step",
        "num_transcripts",  # of an evaluation
        "eval.every",  # of `sd-search sft`
        "selection.min_searches",  # of `sd-search select`, as the next
        "selection.blocks_per_question",
    ),
    "1 or more": (
        "data.max_eval_questions",
        "retriever.top_k",
        "retriever.search.effort",
        "retriever.search.fusion_depth",
        "retriever.search.fusion_constant",
        "search.effort",  # of `sd-search retriever serve`, as the next
        "search.fusion_depth",
        "search.fusion_constant",
        "vector_index.effort",  # of `sd-search data index`
        "retriever.client.max_request_queries",
        "retriever.client.max_connections",
        "retriever.client.breaker_failures",
        "retriever.client.cache_size",
        "rollout.questions_per_step",
        "rollout.group_size",
        "rollout.max_turn_tokens",
        "rollout.max_observation_tokens",
        "rollout.max_query_bytes",
        "rollout.max_rollout_tokens",
        "rollout.max_concurrent_sequences",
        "rollout.vllm.num_replicas",
        "publish.attempts",
        "rollout.vllm.tensor_parallel_size",
        "rollout.vllm.block_tokens",
        "rollout.vllm.threads_per_worker",
        "distill.top_k",
        "update.max_microbatch_tokens",
        "update.head_chunk_rows",
        "update.sequence_parallel_size",
        "update.tensor_parallel_size",
        "checkpoint.keep",
        "safety.roll_back_after_refusals",
        "safety.stop_after_refusals",
        "safety.spike_window",
        "limit",  # of an evaluation, as the next three
        "batch_tokens",
        "num_samples",
        "num_resamples",
        "lift.num_resamples",
        "selection.per_question",
        "episodes_per_step",  # of `sd-search sft`, as the next
        "max_validation_episodes",
        "eval.limit",
        "selection.max_tokens",
    ),
    "more than 0": (
        "retriever.client.deadline_s",
        "retriever.qdrant.deadline_s",
        "retriever.opensearch.deadline_s",
        "retriever.client.try_timeout_s",
        "retriever.client.first_pause_s",
        "retriever.client.max_pause_s",
        "retriever.client.breaker_open_s",
        "temperature",
        "rollout.temperature",  # evaluation decodes greedily by itself
        "rollout.vllm.kv_cache_gib",
        "rollout.vllm.start_timeout_s",
        "rollout.vllm.request_timeout_s",
        "model.lora.alpha",
        "policy_loss.clip",
        "policy_loss.clip_high",
        "policy_loss.importance_cap",
        "distill.temperature",
        "distill.importance_cap",
        "distill.entry_clip",
        "distill.alpha.target_ratio",
        "distill.alpha.max_value",
        "optimizer.learning_rate",
        "num_epochs",
        "safety.stop_after_s",
        "publish.bucket_mib",
        "publish.timeout_s",
    ),
    "between 0 and 1": (
        "rollout.max_failed_share",
        "rollout.vllm.gpu_memory_share",
        "optimizer.betas",
        "optimizer.final_ratio",
        "distill.ema_decay",
        "policy_loss.weight",
        "advantage.discount",
        "selection.min_pass_rate",
        "selection.max_pass_rate",
        "selection.shuffled_share",
        "selection.wrong_question_share",
        "selection.validation_share",
    ),
    "strictly between 0 and 1": ("beta",),
}
_IN_RANGE: dict[str, Callable[[Any], bool]] = {
    "0": lambda value: 0 <= value < math.inf,
    "1": lambda value: 1 <= value < math.inf,
    "more": lambda value: 0 < value < math.inf,
    "between": lambda value: 0 <= value <= 1,
    "strictly": lambda value: 0 < value < 1,
}


def check_ranges(config: Any) -> None:
    """Raise ConfigError for a number out of its range, or passages from nowhere, in any record that has
    some of the training configuration's keys."""
    retriever = _value(config, "retriever")
    if retriever is not None:
        found = [name for name in ("corpus", "endpoints", "qdrant", "opensearch") if getattr(retriever, name)]
        if len(found) != 1:
            expected = (
                "expected one: a corpus directory, its servers, a Qdrant collection, or an OpenSearch index"
            )
            names = "retriever.corpus, .endpoints, .qdrant, .opensearch"
            raise ConfigError(f"{names}: found {' and '.join(found) or 'none'}, {expected}")
    for expected, keys in _RANGES.items():
        in_range = _IN_RANGE[expected.split()[0]]
        for key in keys:
            value = _value(config, key)
            if not all(
                map(in_range, value if isinstance(value, tuple) else [] if value is None else [value])
            ):
                raise ConfigError(f"{key}: found {value!r}, expected {expected}")
    optimizer = _value(config, "optimizer")
    if optimizer is not None and optimizer.final_ratio is not None and not optimizer.decays:
        raise ConfigError(
            f"optimizer.final_ratio: found {optimizer.final_ratio} with optimizer.schedule "
            f"{optimizer.schedule}, expected none, since a constant rate has no end to fall to; or schedule "
            "linear or cosine"
        )


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
    _check_reward(config.reward)
    _check_policy_loss(config.policy_loss)
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
    if config.update.sequence_parallel_size > 1 and config.model.attention != "sdpa":
        found = f"found {config.model.attention} with update.sequence_parallel_size above 1"
        raise ConfigError(f"model.attention: {found}, expected sdpa")
    if config.model.lora.rank and config.publish.source == "master":
        raise ConfigError(
            "publish.source: found master with model.lora.rank above 0, expected parameters: W has no master"
            " then"
        )


def _check_reward(reward: RewardConfig) -> None:
    if reward.overlong_buffer > reward.overlong_limit:
        raise ConfigError(
            f"reward.overlong_limit: found {reward.overlong_limit} with reward.overlong_buffer"
            f" {reward.overlong_buffer}, expected at least as many sampled tokens: rollouts lose 1 there"
        )


def _check_policy_loss(loss: PolicyLossConfig) -> None:
    """What bounds ratios: the cap, or the clips, which it takes the place of."""
    if loss.dual_clip is not None and not loss.dual_clip > 1.0:
        raise ConfigError(
            f"policy_loss.dual_clip: found {loss.dual_clip}, expected more than 1: a loss at a ratio of 1 is one"
            " advantage already"
        )
    for key in ("clip_high", "dual_clip"):
        if loss.importance_cap is not None and getattr(loss, key) is not None:
            raise ConfigError(
                f"policy_loss.{key}: found {getattr(loss, key)} with policy_loss.importance_cap"
                f" {loss.importance_cap}, expected one of the two: the cap takes the place of all clips"
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


def _value(config: Any, key: str) -> Any:
    """The value of a dotted key, None where the record has no such key."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def engine_reads_policy(config: Config, num_ranks: int) -> bool:
    """The embedded engine can read the policy's weights where they are: one rank holds them all, and
    nothing samples while they change."""
    is_alone = num_ranks == 1 and config.update.zero_stage == 3 and config.update.offload_parameters == "none"
    return is_alone and config.rollout.engine == "torch" and config.rollout.max_lag == 0
