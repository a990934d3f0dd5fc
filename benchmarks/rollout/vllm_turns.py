"""Rollouts on vLLM: concurrent multi-turn against lock-step turns, on the same server and with the same
searches.

    python -m benchmarks.rollout.vllm_turns [--json FILE]        (in an environment with vLLM: make .venv-vllm/ready)

The rollouts, searches and latencies of turns.py; only the engine is another one.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from benchmarks.baseline import Comparison, report
from benchmarks.rollout.turns import LIMITS, MEDIAN_LATENCY_S, Bench, SlowRetriever, in_turn
from benchmarks.tiny_model import write_model
from megatron_sd.building.rollout_side import build_engine
from megatron_sd.config import ModelConfig, RolloutConfig, VllmConfig
from megatron_sd.distributed.world import lone_world
from megatron_sd.errors import ConfigError
from megatron_sd.rollout.vllm.server_process import require_vllm
from megatron_sd.search.tokens import load_codec

ROLLOUT = RolloutConfig(
    group_size=LIMITS.group_size,
    max_search_turns=LIMITS.max_search_turns,
    max_turn_tokens=LIMITS.max_turn_tokens,
    max_observation_tokens=LIMITS.max_observation_tokens,
    engine="vllm",
    vllm=VllmConfig(kv_cache_gib=0.5, block_tokens=32),
)


def main() -> None:
    """Run the comparison and report it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    try:
        require_vllm()
    except ConfigError as error:
        print(f"not measured: {error}")
        return
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), vocabulary=1024, hidden=64, layers=2)
        model, codec = (
            ModelConfig(path=directory, dtype="float32"),
            load_codec(directory),
        )
        bench, slow = Bench(Path(directory)), SlowRetriever(num_letters=60, median_s=MEDIAN_LATENCY_S)
        with contextlib.closing(
            build_engine(model, ROLLOUT, codec, lone_world(), output=Path(directory))
        ) as engine:
            ours, theirs = in_turn(
                lambda: bench.concurrent(engine, slow), lambda: bench.lock_step(engine, slow)
            )
    name = "searches of varying latency, vLLM"
    compared = Comparison(name=name, ours=ours, theirs=theirs, unit="ms/token", against="lock-step")
    report("vllm_rollout", [compared], arguments.json)


if __name__ == "__main__":
    main()
