"""What `sd-search sft` may be asked for, and the trainer's configuration that follows from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_sd.config import (
    AdvantageConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyLossConfig,
    ProtocolConfig,
    PublishConfig,
    RetrieverConfig,
    RewardConfig,
    RolloutConfig,
    SafetyConfig,
    UpdateConfig,
    VllmConfig,
)
from megatron_sd.config.checks import check
from megatron_sd.config.command_line import parse
from megatron_sd.config.ranges import check_ranges
from megatron_sd.errors import ConfigError
from megatron_sd.rollout.stored import EPISODES_NAME, TRAIN_NAME, VALIDATION_NAME, StoredGroups, read_record

EVALUATION_SECTIONS = ("retriever", "protocol", "rollout")  # that an evaluation cannot do without


@dataclass(frozen=True, kw_only=True)
class SftEvalConfig:
    """Greedy rollouts on the first `limit` questions of a file, or of a split of it: before the first step,
    every `every` steps, and at the end."""

    questions: str  # a questions file
    split: str | None = None  # keep only records whose `split` equals this
    limit: int = 200  # the first ones alone
    every: int = 0  # 0: before the first step and at the end alone


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Train `model` on the directory `episodes`, which `sd-search select` wrote, by the likelihood of the
    tokens that were sampled: none of the prompt, of a block or of the environment. The sections are those of
    `sd-search train`.

    eval: what the policy does on questions, by `retriever`, `protocol`, `rollout`, `reward` and `publish`.
    These are of the evaluation alone: without it no retriever is opened and no engine is built."""

    run_dir: str  # checkpoints and metrics; the same command goes on there
    model: ModelConfig
    episodes: str  # a directory of `sd-search select`
    num_epochs: float = 2.0  # how often episodes are gone through
    num_steps: int | None = None  # None: as many as num_epochs take
    episodes_per_step: int = 32  # of all ranks together
    max_validation_episodes: int = 200  # whose loss is measured first, last, and every log.eval_every steps
    # the loss is a mean over tokens, or over episodes' means
    aggregation: Literal["token", "rollout"] = "token"
    seed: int = 0  # of the episodes' order
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, warmup_steps=10)
    )
    update: UpdateConfig = field(default_factory=UpdateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(eval_every=10))
    eval: SftEvalConfig | None = None
    retriever: RetrieverConfig | None = None
    protocol: ProtocolConfig | None = None
    rollout: RolloutConfig | None = None
    reward: RewardConfig = field(default_factory=RewardConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


def load(argv: Sequence[str]) -> tuple[SftConfig, Config]:
    """What `sd-search sft` was asked for, and the training configuration it stands for. Raises ConfigError,
    and DataError for episodes that are none."""
    own = parse(SftConfig, argv, "sd-search sft")
    check_sft(own)
    return own, _checked(own, training_config(own))


def load_unread(argv: Sequence[str]) -> tuple[SftConfig, Config]:
    """The same for a planner: the episodes need not exist yet, and nobody counts them. Raises ConfigError."""
    own = parse(SftConfig, argv, "sd-search sft")
    check_sft(own)
    return own, _checked(own, _as_training(own, own.num_steps or 1))


def _checked(own: SftConfig, config: Config) -> Config:
    check(config)
    if own.eval is not None:
        check(evaluation_config(own, config))
    return config


def check_sft(own: SftConfig) -> None:
    """Raise ConfigError for a value out of range, and for an evaluation without what it needs. Reads no
    file."""
    check_ranges(own)
    if own.update.updates_per_batch > 1:
        raise ConfigError(
            f"update.minibatches, update.epochs: found {own.update.minibatches} and {own.update.epochs}, expected"
            " 1 and 1: episodes_per_step and num_epochs say how episodes are gone through"
        )
    missing = [name for name in EVALUATION_SECTIONS if getattr(own, name) is None]
    if own.eval is not None and missing:
        raise ConfigError(
            f"eval: found it without {', '.join(missing)}, expected the sections "
            f"{', '.join(EVALUATION_SECTIONS)} beside it, as the episodes were sampled with; or no eval"
        )


def training_config(own: SftConfig) -> Config:
    """The trainer's configuration: episodes in the place of questions, likelihood in the place of the
    clipped loss, no teacher, no reference policy. Raises DataError for a directory without episodes."""
    directory = Path(own.episodes)
    read_record(directory / EPISODES_NAME, "sd-search select")
    num_steps = own.num_steps
    if num_steps is None:
        num_steps = math.ceil(
            own.num_epochs * len(StoredGroups(directory / TRAIN_NAME)) / own.episodes_per_step
        )
    return _as_training(own, num_steps)


def _as_training(own: SftConfig, num_steps: int) -> Config:
    directory = Path(own.episodes)
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
        advantage=AdvantageConfig(estimator="one"),
        policy_loss=PolicyLossConfig(objective="likelihood", kl_weight=0.0, aggregation=own.aggregation),
        distill=DistillConfig(block="none", measure_every=0),
        optimizer=own.optimizer,
        update=own.update,
        checkpoint=own.checkpoint,
        safety=own.safety,
        log=own.log,
    )


def evaluation_config(own: SftConfig, config: Config) -> Config:
    """What the engine, its retriever and the publisher of the evaluation are built from: the run with the
    questions of own.eval (which must be set), and one greedy rollout each. It decides nothing that is
    trained, so it is no part of the run's identity."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, eval=own.eval.questions, eval_split=own.eval.split, max_eval_questions=own.eval.limit
        ),
        retriever=own.retriever,
        protocol=own.protocol,
        rollout=dataclasses.replace(own.rollout, questions_per_step=own.eval.limit, group_size=1, max_lag=0),
        reward=own.reward,
        publish=own.publish,
    )


def planned_config(own: SftConfig, config: Config) -> Config:
    """What a planner counts memory of: the evaluation's engine, or, without one, none on these ranks."""
    if own.eval is not None:
        return evaluation_config(own, config)
    elsewhere = dataclasses.replace(config.rollout, engine="vllm", vllm=VllmConfig(placement="server"))
    return dataclasses.replace(config, rollout=elsewhere)
