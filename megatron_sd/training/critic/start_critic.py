"""Where a critic begins."""

from __future__ import annotations

import dataclasses

from megatron_sd.config import CriticConfig
from megatron_sd.training.critic.critic import Critic
from megatron_sd.training.critic.value_module import ValueModule
from megatron_sd.training.placement import reads_shards
from megatron_sd.training.policy import under_deepspeed
from megatron_sd.training.start_policy import StartPolicy
from megatron_sd.training.state.identity import check_same_model
from megatron_sd.training.teacher_side.reference import ReferencePolicy


def start_critic(start: StartPolicy, config: CriticConfig, *, reference: ReferencePolicy | None) -> Critic:
    """The critic of config.path, or of the start policy's checkpoint, sharded and checkpointed as the policy
    is, dropout off; adapters are the policy's alone. Collective. Raises DataError where the directory holds
    no model, or other files on another node."""
    if config.path is not None:
        check_same_model(config.path, start.parallel.world, "critic.path")
        start = dataclasses.replace(start, model=dataclasses.replace(start.model, path=config.path))
    module = ValueModule(start.load(on_demand=reads_shards(start.update)))
    return Critic(
        under_deepspeed(module, start, config.optimizer),
        start.parallel,
        zero_stage=start.update.zero_stage,
        config=config,
        reference=reference,
    )
