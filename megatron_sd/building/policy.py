"""The composition root's part for the trained policy: configuration in, a policy under DeepSpeed out."""

from __future__ import annotations

import dataclasses
import functools

from megatron_sd.algorithm.advantages.table import FROM_VALUES
from megatron_sd.algorithm.learning_rate import learning_rate
from megatron_sd.config import Config
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.errors import ConfigError
from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.head.types import HeadOptions
from megatron_sd.search.tokens import TextCodec, load_codec
from megatron_sd.training.critic.critic import Critic
from megatron_sd.training.critic.start_critic import start_critic
from megatron_sd.training.lora import with_adapters
from megatron_sd.training.parallel.tensor import check_model, head_shard
from megatron_sd.training.placement import check_disk_offload, reads_shards
from megatron_sd.training.policy import Policy, under_deepspeed
from megatron_sd.training.policy_module import PolicyModule
from megatron_sd.training.start_policy import StartPolicy
from megatron_sd.training.state.identity import check_same_model
from megatron_sd.training.teacher_side.reference import ReferencePolicy
from megatron_sd.training.teacher_side.teacher import TEACHERS


def build_policy(config: Config, parallel: Parallel, critic: Critic | None = None) -> Policy:
    """The policy of config.model.path under DeepSpeed; beside it the frozen start policy when
    policy_loss.kl_weight asks for one in the loss, and the teacher. critic: kept in its checkpoints.
    Collective. Raises ConfigError or DataError."""
    head = head_options(config)
    _check(config)
    check_same_model(config.model.path, parallel.world, "model.path")
    start = StartPolicy(model=config.model, update=config.update, parallel=parallel)
    has_loss = config.policy_loss.kl_weight > 0.0 and config.policy_loss.kl != "k1_reward"
    reference = ReferencePolicy(start, head) if has_loss else None
    has_blocks = config.distill.block != "none"
    teacher = TEACHERS[config.distill.teacher if has_blocks else "live"](start, config.distill)
    module = _policy_module(start, head, config)
    return Policy(
        under_deepspeed(module, start, config.optimizer),
        parallel,
        zero_stage=config.update.zero_stage,
        learning_rate_of=functools.partial(
            learning_rate,
            num_steps=config.num_steps * config.update.updates_per_batch,
            config=config.optimizer,
        ),
        reference=reference,
        teacher=teacher,
        companion=critic,
    )


def build_critic(config: Config, parallel: Parallel) -> Critic | None:
    """PPO's critic, where the estimator needs one; beside it the frozen start policy where a KL to it is part
    of the reward. Collective. Raises ConfigError or DataError."""
    if config.advantage.estimator not in FROM_VALUES:
        return None
    _check(config)
    start = StartPolicy(model=config.model, update=config.update, parallel=parallel)
    in_reward = config.policy_loss.kl_weight > 0.0 and config.policy_loss.kl == "k1_reward"
    reference = ReferencePolicy(start, head_options(config)) if in_reward else None
    return start_critic(start, config.critic, reference=reference)


def check_same_tokens(config: Config, codec: TextCodec) -> None:
    """Raise ConfigError where a teacher or a critic of another checkpoint reads other text in the policy's
    ids; codec: the policy's. DataError for a directory without a tokenizer."""
    paths = {"distill.teacher_path": config.distill.teacher_path}
    if config.advantage.estimator in FROM_VALUES:
        paths["critic.path"] = config.critic.path
    for key, path in paths.items():
        found = codec.fingerprint if path is None else load_codec(path).fingerprint
        if found != codec.fingerprint:
            whose = "critic" if key == "critic.path" else "teacher"
            raise ConfigError(
                f"{key}: found another tokenizer in {path} ({found}) than in {config.model.path}"
                f" ({codec.fingerprint}), expected the same: the {whose} reads the policy's ids as they are, so"
                f" they must mean the same to both; choose a {whose} of the same family"
            )


def head_options(config: Config) -> HeadOptions:
    """The head's part of the configuration. Rollouts sampled greedily (temperature 0) are scored at
    temperature 1. Raises ConfigError where the divergence's values are out of range."""
    distill = config.distill
    return HeadOptions(
        sampling_temperature=config.rollout.temperature or 1.0,
        divergence=Divergence(
            kind=distill.divergence,
            beta=distill.beta,
            temperature=distill.temperature,
            top_k=distill.top_k,
            support=distill.support,
            entry_clip=distill.entry_clip,
            scale_by_temperature_squared=distill.scale_by_temperature_squared,
            tail_bucket=distill.tail_bucket,
        ),
        teacher_logits=distill.teacher_logits,
        chunk_rows=config.update.head_chunk_rows,
        target=distill.target,
    )


def _check(config: Config) -> None:
    if config.update.zero_stage == 0 and config.model.dtype != "float32":
        raise ConfigError(
            "update.zero_stage 0 keeps no float32 master weights: expected model.dtype float32, or a stage 1"
            " to 3"
        )
    check_disk_offload(config.update)


def _policy_module(start: StartPolicy, head: HeadOptions, config: Config) -> PolicyModule:
    """The start policy with adapters where it has some, and this rank's part of the head."""
    model = start.load(on_demand=reads_shards(config.update))
    model = with_adapters(model, config.model.lora, seed=config.seed)
    check_model(model, config.update)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    shard = head_shard(start.parallel.tensor, vocabulary)
    return PolicyModule(model, dataclasses.replace(head, shard=shard), config.policy_loss, config.distill)
