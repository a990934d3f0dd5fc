"""The door of `sd-search sft`: the trainer's own loop on stored episodes, by the likelihood of what the policy sampled in them.

    python -m megatron_sd.sft --model.path DIR --episodes EPISODES --run_dir RUN

The model directory of the last checkpoint (adapters merged) is what `gate`, `train` and `eval` start from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_sd.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    RetrieverConfig,
    RolloutConfig,
    SafetyConfig,
    UpdateConfig,
)
from megatron_sd.config.checks import check, check_ranges
from megatron_sd.config.command_line import parse
from megatron_sd.rollout.stored import EPISODES_NAME, TRAIN_NAME, VALIDATION_NAME, StoredGroups, read_record
from megatron_sd.train import run_door, train_run

if TYPE_CHECKING:
    from megatron_sd.distributed.control import StopRequest
    from megatron_sd.distributed.world import World
    from megatron_sd.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Train `model` on the directory `episodes`, which `sd-search select` wrote, by the likelihood of the tokens that were
    sampled: none of the prompt, of a block or of the environment. The sections are those of `sd-search train`."""

    run_dir: str
    model: ModelConfig
    episodes: str
    num_epochs: float = 2.0
    num_steps: int | None = None  # None: as many as num_epochs take
    episodes_per_step: int = 32
    max_validation_episodes: int = 200  # whose loss is measured first, last, and every log.eval_every steps
    aggregation: Literal["token", "rollout"] = "token"
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5, warmup_steps=10))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(eval_every=10))


def load(argv: Sequence[str]) -> tuple[SftConfig, Config]:
    """What `sd-search sft` was asked for, and the training configuration it stands for. Raises ConfigError, and DataError for
    episodes that are none."""
    own = parse(SftConfig, argv, "sd-search sft")
    check_ranges(own)
    config = training_config(own)
    check(config)
    return own, config


def training_config(own: SftConfig) -> Config:
    """The trainer's configuration: episodes in the place of questions, likelihood in the place of the clipped loss, no teacher,
    no reference policy. Raises DataError for a directory without episodes."""
    directory = Path(own.episodes)
    read_record(directory / EPISODES_NAME, "sd-search select")
    num_steps = own.num_steps
    if num_steps is None:
        num_steps = math.ceil(own.num_epochs * len(StoredGroups(directory / TRAIN_NAME)) / own.episodes_per_step)
    return Config(
        run_dir=own.run_dir,
        model=own.model,
        data=DataConfig(
            train=str(directory / TRAIN_NAME),
            eval=str(directory / VALIDATION_NAME),
            max_eval_questions=own.max_validation_episodes,
        ),
        retriever=RetrieverConfig(corpus=str(directory)),  # nobody searches
        num_steps=num_steps,
        seed=own.seed,
        rollout=RolloutConfig(questions_per_step=own.episodes_per_step, group_size=1),
        policy_loss=PolicyLossConfig(objective="likelihood", advantage="one", kl_weight=0.0, aggregation=own.aggregation),
        distill=DistillConfig(block="none", measure_every=0),
        optimizer=own.optimizer,
        update=own.update,
        checkpoint=own.checkpoint,
        safety=own.safety,
        log=own.log,
    )


def main(argv: Sequence[str]) -> int:
    """Train one run; the exit code is that of `sd-search train`."""
    return run_door(lambda stop: _train(argv, stop))


def _train(argv: Sequence[str], stop: StopRequest) -> int:
    own, training = load(argv)

    def build(config: Config, world: World) -> Trainer:
        from megatron_sd.build_sft import build_sft_trainer  # imports DeepSpeed, which must see join_world's device

        return build_sft_trainer(config, Path(own.episodes), world)

    return train_run(training, stop, build)


if __name__ == "__main__":
    from megatron_sd.distributed.world import end_process

    end_process(main(sys.argv[1:]))
