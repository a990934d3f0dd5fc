"""What is launched or planned: training, or a warm-up on episodes; both as a configuration of the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.presets import expand
from megatron_sd.config import Config
from megatron_sd.config.load import dump, load
from megatron_sd.errors import ConfigError
from megatron_sd.sft_config import SftConfig, planned_config
from megatron_sd.sft_config import load as load_sft
from megatron_sd.sft_config import load_unread as load_sft_unread

Program = Literal["train", "sft"]
_KEYS_OF_SFT = {f.name for f in dataclasses.fields(SftConfig)} - {f.name for f in dataclasses.fields(Config)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. module: what its ranks execute. text: the YAML that the module reads. batch: the key of a
    step's size, its value, and what it counts, in the singular.

    config: what the ranks hold and do. A warm-up's has the engine of its evaluation; where nobody `samples`,
    its engine is one elsewhere, of which nothing is counted.
    """

    program: Program
    module: str
    config: Config
    text: str
    batch: tuple[str, int, str]
    samples: bool = True


def training_job(config: Config) -> Job:
    """`sd-search train`."""
    batch = ("rollout.questions_per_step", config.rollout.questions_per_step, "question")
    return Job(program="train", module="megatron_sd.train", config=config, text=dump(config), batch=batch)


def sft_job(own: SftConfig, config: Config) -> Job:
    """`sd-search sft`; config: of sft_config.load. The text has the number of steps, which the episodes
    decided."""
    return Job(
        program="sft",
        module="megatron_sd.sft",
        config=planned_config(own, config),
        text=dump(dataclasses.replace(own, num_steps=config.num_steps)),
        batch=("episodes_per_step", own.episodes_per_step, "episode"),
        samples=own.eval is not None,
    )


def _read_training(argv: Sequence[str]) -> Job:
    try:
        return training_job(load(expand(argv)[0]))
    except ConfigError as error:
        key = str(error).partition(":")[0]
        if key in _KEYS_OF_SFT:
            raise ConfigError(
                f"{key}: found with program train, expected --program sft for a warm-up, or no such key"
            ) from error
        raise


# By program: from a run's options to the run. Raises ConfigError, and DataError for episodes that are none.
JOBS: Mapping[Program, Callable[[Sequence[str]], Job]] = {
    "train": _read_training,
    "sft": lambda argv: sft_job(*load_sft(argv)),
}
# The same for a plan, for which no episodes need to be there.
PLANNED_JOBS: Mapping[Program, Callable[[Sequence[str]], Job]] = {
    **JOBS,
    "sft": lambda argv: sft_job(*load_sft_unread(argv)),
}
