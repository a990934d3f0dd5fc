"""What training on this machine's processors will take of its memory, all ranks together, and what would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launch.memory import GIB, peak, rank_memory
from launch.models import model_config
from megatron_sd.config import Config
from megatron_sd.resharding.names import UnknownArchitectureError, model_shape

PROCESS_GIB = 0.8  # of a rank before it has a model: Python, torch, DeepSpeed and the retriever's code


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Bytes at the worst moment of all ranks, and what is available. remedies: changes under which it would fit."""

    needed: float
    available: float
    phase: str
    num_ranks: int
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is as much as is needed."""
        return self.needed <= self.available

    def __str__(self) -> str:
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks together"
        found = f"{self.needed / GIB:.1f} GiB planned for {ranks} (worst moment: {self.phase}), "
        found += f"{self.available / GIB:.1f} GiB available on this machine"
        if self.fits:
            return found
        if not self.remedies:
            return f"{found}; none of the usual remedies is enough"
        return f"{found}; it would fit with {' or with '.join(self.remedies)}"


def plan_on_cpus(config: Config, num_ranks: int, *, available: float) -> Planned | None:
    """available: bytes. None for a model whose sizes the planner does not know. Raises ConfigError or DataError without one."""
    try:
        shape = model_shape(model_config(config.model.path))
    except UnknownArchitectureError:
        return None

    def planned(candidate: Config) -> tuple[float, str]:
        parts = rank_memory(shape, candidate, world_size=num_ranks, on_gpu=False)
        host = sum(part.num_bytes for part in parts if part.where == "host")
        needed, phase = peak(parts)
        return num_ranks * (needed + host + PROCESS_GIB * GIB), phase

    needed, phase = planned(config)
    remedies = ()
    if needed > available:
        remedies = tuple(words for words, change in REMEDIES.items() if planned(change(config))[0] <= available)
    return Planned(needed=needed, available=available, phase=phase, num_ranks=num_ranks, remedies=remedies)


def _smaller_microbatches(config: Config) -> Config:
    small = dataclasses.replace(config.update, max_microbatch_tokens=2048, head_chunk_rows=256)
    return dataclasses.replace(config, update=small)


def _checkpointing(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=True))


def _adapters(config: Config) -> Config:
    lora = dataclasses.replace(config.model.lora, rank=16)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


def _fewer_rows(config: Config) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_concurrent_sequences=16))


def _no_start_policy(config: Config) -> Config:
    return dataclasses.replace(config, policy_loss=dataclasses.replace(config.policy_loss, kl_weight=0.0))


def _all_of(*changes: Callable[[Config], Config]) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        for one in changes:
            config = one(config)
        return config

    return change


_SMALL = _all_of(_checkpointing, _smaller_microbatches, _fewer_rows)
_SMALL_WORDS = (
    "model.gradient_checkpointing true, update.max_microbatch_tokens 2048, update.head_chunk_rows 256 and "
    "rollout.max_concurrent_sequences 16"
)
REMEDIES: Mapping[str, Callable[[Config], Config]] = {
    "model.gradient_checkpointing true": _checkpointing,
    "update.max_microbatch_tokens 2048 and update.head_chunk_rows 256": _smaller_microbatches,
    "rollout.max_concurrent_sequences 16": _fewer_rows,
    _SMALL_WORDS: _SMALL,
    f"policy_loss.kl_weight 0 and {_SMALL_WORDS}": _all_of(_no_start_policy, _SMALL),
    f"model.lora.rank 16 and {_SMALL_WORDS}": _all_of(_adapters, _SMALL),
}
