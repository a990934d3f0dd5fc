"""One training run: all sections, and those that only a run has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sd.config.loss import AdvantageConfig, CriticConfig, DistillConfig, PolicyLossConfig
from megatron_sd.config.model import ModelConfig
from megatron_sd.config.retriever import RetrieverConfig
from megatron_sd.config.rollout import ProtocolConfig, RewardConfig, RolloutConfig
from megatron_sd.config.update import OptimizerConfig, PublishConfig, UpdateConfig
from megatron_sd.records import Layout


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """A further set of training questions."""

    train: str  # its file
    weight: float = 1.0  # of the set, beside data.weight: the share of the questions that a run asks
    split: str | None = None  # keep only records whose `split` equals this


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions: jsonl, one record a line (`sd-search data import` writes it)."""

    train: str  # questions to train on
    eval: str | None = None  # held-out questions, for log.eval_every
    train_split: str | None = None  # keep only records whose `split` equals this
    weight: float = 1.0  # of these questions beside those of `mix`
    mix: dict[str, MixConfig] = field(default_factory=dict)  # further sets, by a name
    # samples.jsonl of `sd-search eval`: only questions that it answered right in a share within pass_range
    pass_rates: str | None = None
    pass_range: tuple[float, float] = (0.0, 1.0)  # from the lowest to the highest share
    eval_split: str | None = None  # as train_split
    max_eval_questions: int = 200  # the first ones, when there are more
    shuffle: bool = True  # the training questions, anew in each pass


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when. `every` 0: only at the end."""

    every: int = 50  # steps from one checkpoint to the next
    keep: int = 2  # the newest ones
    # copy to host memory, and write while the next step runs: a kill until then costs the one before it
    background: bool = False
    resume: bool = True  # continue from the newest checkpoint of run_dir that verifies
    # go on with another plan (learning rate, batch, limits, weights of the loss), and record it
    allow_changes: bool = False


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What keeps a run going, or ends it, when something goes wrong (docs/trust.md)."""

    # before `sd-search train` starts, when the planner sees no fit
    check_memory: Literal["warn", "refuse", "off"] = "warn"
    # a rank that does not move for so long ends all ranks, with every rank's stacks; 0: never
    watchdog_s: float = 1800.0
    # of this start: save and end with exit code 85, as run_dir/control/STOP or SIGUSR1 asks
    stop_after_s: float | None = None
    # starts in a row that committed no new checkpoint, before the next one is refused; 0: any number
    max_idle_attempts: int = 3
    # steps refused (not finite, spike) before the run goes back to its last checkpoint
    roll_back_after_refusals: int = 3
    stop_after_refusals: int = 5  # of these, and of steps without a sampled token
    # refuse a step whose log gradient norm lies so many robust deviations above the median; 0: none
    spike_sigmas: float = 0.0
    spike_window: int = 256  # steps that median and deviation are taken from


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """metrics.jsonl and transcripts under run_dir, and where else its scalars go (docs/tracking.md)."""

    # where scalars go, beside metrics.jsonl
    sinks: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    project: str = "megatron_sd"  # of the services, as the next
    run_name: str | None = None  # None: the name of run_dir
    wandb_mode: Literal["online", "offline"] | None = None  # None: as WANDB_MODE says, else online
    mlflow_uri: str | None = None  # None: as MLFLOW_TRACKING_URI says, else MLflow's own default
    eval_every: int = 0  # 0: only when asked for by `sd-search eval`
    transcripts_every: int = 10  # steps from one to the next; 0: never
    transcripts_per_step: int = 4  # questions whose groups are written


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    run_dir: str  # checkpoints, metrics and transcripts; the same command goes on there
    model: ModelConfig
    data: DataConfig
    retriever: RetrieverConfig
    num_steps: int = 200  # of the loop: rollouts, and the update that they are used for
    seed: int = 0  # of questions' order and of sampling
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def layout(self) -> Layout:
        """How the sequences of a microbatch are read."""
        return layout_of(self.model, self.update)


def layout_of(model: ModelConfig, update: UpdateConfig) -> Layout:
    """How sequences are read: an attention that can, reads what they share once."""
    if not update.pack_sequences:
        return "padded"
    return "shared" if model.attention == "varlen" else "packed"
