"""What values of the configuration are in range, in any record that has some of its keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_sd.config.update import AUTO
from megatron_sd.errors import ConfigError

_RANGES: dict[str, tuple[str, ...]] = {
    "0 or more": (
        "num_steps",
        "rollout.max_search_turns",
        "rollout.max_resamples",
        "reward.format_weight",
        "reward.structure",
        "reward.final",
        "reward.retrieval",
        "reward.overlong_buffer",
        "policy_loss.kl_weight",
        "policy_loss.entropy_weight",
        "advantage.weight",
        "advantage.step_scale",
        "distill.measure_every",
        "distill.alpha.value",
        "distill.alpha.warmup_steps",
        "critic.warmup_steps",
        "critic.warmup_only_steps",
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
        "retriever.search.rerank.depth",
        "retriever.web.num_results",
        "retriever.web.max_calls",
        "retriever.web.max_connections",
        "retriever.search.rerank.max_tokens",
        "retriever.search.rerank.batch_size",
        "search.effort",  # of `sd-search retriever serve`, as the next five
        "search.fusion_depth",
        "search.fusion_constant",
        "search.rerank.depth",
        "search.rerank.max_tokens",
        "search.rerank.batch_size",
        "vector_index.effort",  # of `sd-search data index`
        "retriever.client.max_request_queries",
        "retriever.client.max_connections",
        "retriever.client.breaker_failures",
        "retriever.client.cache_size",
        "rollout.questions_per_step",
        "rollout.group_size",
        "rollout.attempts",
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
        "update.minibatches",
        "update.epochs",
        "update.head_chunk_rows",
        "update.sequence_parallel_size",
        "update.tensor_parallel_size",
        "checkpoint.keep",
        "safety.roll_back_after_refusals",
        "safety.stop_after_refusals",
        "safety.spike_window",
        "reward.judge.tries",
        "reward.judge.max_concurrent",
        "reward.judge.max_tokens",
        "judge.tries",  # of an evaluation, as the next six
        "judge.max_concurrent",
        "judge.max_tokens",
        "limit",
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
        "retriever.web.deadline_s",
        "retriever.web.try_timeout_s",
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
        "policy_loss.engine_cap",
        "distill.importance_cap",
        "distill.entry_clip",
        "policy_loss.top_entropy_share",
        "distill.temperature",
        "distill.alpha.target_ratio",
        "distill.alpha.max_value",
        "optimizer.learning_rate",
        "critic.learning_rate",
        "critic.value_clip",
        "num_epochs",
        "judge.deadline_s",
        "reward.judge.deadline_s",
        "data.weight",
        "safety.stop_after_s",
        "publish.bucket_mib",
        "publish.timeout_s",
    ),
    "between 0 and 1": (
        "rollout.max_failed_share",
        "rollout.keep_range",
        "data.pass_range",
        "judge.max_failed_share",
        "reward.judge.max_failed_share",
        "rollout.vllm.gpu_memory_share",
        "optimizer.betas",
        "optimizer.final_ratio",
        "distill.ema_decay",
        "policy_loss.weight",
        "advantage.discount",
        "critic.lam",
        "critic.gamma",
        "advantage.modulation_weight",
        "policy_loss.top_entropy_share",
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
        found = [
            name
            for name in ("corpus", "endpoints", "qdrant", "opensearch", "web", "function")
            if getattr(retriever, name)
        ]
        if len(found) != 1:
            expected = (
                "expected one: a corpus directory, its servers, a Qdrant collection, an OpenSearch index, a"
                " search engine of the web, or a function of your own"
            )
            names = "retriever.corpus, .endpoints, .qdrant, .opensearch, .web, .function"
            raise ConfigError(f"{names}: found {' and '.join(found) or 'none'}, {expected}")
    for expected, keys in _RANGES.items():
        in_range = _IN_RANGE[expected.split()[0]]
        for key in keys:
            value = _value(config, key)
            if not all(
                map(in_range, value if isinstance(value, tuple) else [] if value in (None, AUTO) else [value])
            ):
                raise ConfigError(f"{key}: found {value!r}, expected {expected}")
    optimizer = _value(config, "optimizer")
    if optimizer is not None and optimizer.final_ratio is not None and not optimizer.decays:
        raise ConfigError(
            f"optimizer.final_ratio: found {optimizer.final_ratio} with optimizer.schedule "
            f"{optimizer.schedule}, expected none, since a constant rate has no end to fall to; or schedule "
            "linear or cosine"
        )


def _value(config: Any, key: str) -> Any:
    """The value of a dotted key, None where the record has no such key."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config
