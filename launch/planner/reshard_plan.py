"""`sd-search reshard-plan`: what one publish moves between so many ranks and workers. Needs a config.json,
no weights, no GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sd.config.command_line import parse
from megatron_sd.errors import DataError
from megatron_sd.resharding.balance import Balance, balance
from megatron_sd.resharding.layout import ShardLayout
from megatron_sd.resharding.names import whole_parameters, worker_layouts
from megatron_sd.resharding.plan import make_plan


@dataclass(frozen=True, kw_only=True)
class ReshardPlanConfig:
    """Sizes of a run."""

    model: str  # directory with a config.json
    num_ranks: int  # of the trainer, under ZeRO-3
    tp_size: int  # workers of one engine
    num_replicas: int = 1  # engines
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the workers' weights


def main(argv: Sequence[str]) -> None:
    """Build the plan and print its bytes. Raises DataError without a config.json, ConfigError when the
    sizes do not fit."""
    config = parse(ReshardPlanConfig, argv, "sd-search reshard-plan")
    path = Path(config.model) / "config.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"no model configuration at {path} ({error}), expected a Hugging Face model directory"
        ) from error
    started = time.perf_counter()
    source = ShardLayout(parameters=whole_parameters(model, dtype=config.dtype), world_size=config.num_ranks)
    workers = worker_layouts(model, tp_size=config.tp_size, dtype=config.dtype)
    counted = balance(make_plan(source, workers, num_replicas=config.num_replicas))
    print(describe(config, source, counted))
    print(f"planned in            {time.perf_counter() - started:.2f} s")


def describe(config: ReshardPlanConfig, source: ShardLayout, counted: Balance) -> str:
    """The table that is printed."""
    numel = sum(spec.numel for spec in source.parameters)
    chain = counted.longest_chain / max(counted.sent[1], counted.received[1])
    lines = {
        "model": f"{numel / 1e9:.2f} G parameters, {config.dtype}",
        "from": f"{config.num_ranks} ZeRO-3 ranks",
        "to": f"{config.num_replicas} x {config.tp_size} tensor-parallel workers",
        "moved": f"{_size(counted.moved)}, the sum of the workers' shards",
        "gather and broadcast": (
            f"{_size(counted.gathered)}, {counted.gathered / counted.moved:.1f} times as much"
        ),
        "sent by a rank": _range(counted.sent),
        "received by a worker": _range(counted.received),
        "on a link": _range(counted.links),
        "one link at a time": f"{_size(counted.longest_chain)} in a row, {chain:.2f} x the busiest party",
    }
    return "\n".join(f"{name:<21} {value}" for name, value in lines.items())


def _range(sizes: tuple[int, int]) -> str:
    return _size(sizes[0]) if sizes[0] == sizes[1] else f"{_size(sizes[0])} to {_size(sizes[1])}"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 1e3:.2f} kB"
