"""Loading a model directory into ZeRO-3's shards: each rank reads what it owns, against each rank loading
the whole model first.

    python -m benchmarks.training.loading MODEL_DIR [--ranks 4] [--json FILE]

The weights become float32, whatever dtype the files have. Memory: what the ranks hold for themselves at the
worst moment, over what they held before, summed; pages of the mapped files, which they share, do not count
(Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.baseline import Comparison, report
from benchmarks.resident import anonymous_bytes, extra_mib


def load_here(model_dir: str, kind: str) -> None:
    """One rank: load, and print seconds and memory."""
    from megatron_sd.config.load import load
    from megatron_sd.distributed.world import end_process, join_world, leave_world
    from megatron_sd.training.deepspeed_config import deepspeed_config
    from megatron_sd.training.placement import largest_layer, place
    from megatron_sd.training.start_policy import load_for_training

    world = join_world()
    own = {
        "run_dir": "none",
        "data.train": "none",
        "retriever.corpus": "none",
        "model.path": model_dir,
        "model.dtype": "float32",
    }
    config = load([f"--{name}={value}" for name, value in own.items()])
    found: dict[str, float] = {}
    models: list[Any] = []

    def load_and_shard() -> None:
        started = time.perf_counter()
        models.append(load_for_training(config.model, on_demand=kind == "shards"))
        place(
            models[0],
            models[0],
            deepspeed_config(
                config.update,
                config.optimizer,
                dtype=config.model.dtype,
                world_size=world.size,
                device_type=world.device.type,
                layer=largest_layer(models[0]),
            ),
            world.device,
        )
        found["seconds"] = time.perf_counter() - started

    found["gib"] = extra_mib(load_and_shard, anonymous_bytes, every_s=0.02) / 1024
    (model,) = models
    elements = sum(parameter.ds_numel for parameter in model.parameters())
    print("\nFIGURES " + json.dumps(found | {"model_gib": elements * 4 / 2**30}), flush=True)
    leave_world()
    end_process(0)


def measure(model_dir: str, kind: str, num_ranks: int) -> tuple[float, float, float]:
    """GiB of all ranks together, seconds of the slowest, GiB of the model in float32."""
    from launch.local import free_port

    launcher = [
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(num_ranks),
        "--master_port",
        str(free_port()),
        "--no_local_rank",
    ]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "--log_level",
        "error",
        "--module",
        __spec__.name,
        model_dir,
        "--kind",
        kind,
    ]
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"PYTHONPATH": os.getcwd()}  # of this program, which runs elsewhere
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=directory
        )
    lines = [line.partition("FIGURES ")[2] for line in finished.stdout.splitlines()]
    found = [json.loads(line) for line in lines if line]
    if len(found) != num_ranks:
        raise SystemExit(f"{len(found)} of {num_ranks} ranks reported:\n{finished.stdout}{finished.stderr}")
    return sum(own["gib"] for own in found), max(own["seconds"] for own in found), found[0]["model_gib"]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        type=lambda path: str(Path(path).resolve()),
        help="directory of a pretrained model",
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kind", choices=["shards", "whole"], help="of one rank, started by this program")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        print("not measured: it needs the directory of a pretrained model")
        return
    if arguments.kind:
        load_here(arguments.model, arguments.kind)
    gib, seconds, model_gib = measure(arguments.model, "shards", arguments.ranks)
    whole_gib, whole_seconds, _ = measure(arguments.model, "whole", arguments.ranks)
    print(
        f"{arguments.ranks} ranks, a model of {model_gib:.2f} GiB in float32: {gib / model_gib:.2f} models at"
        " the worst moment"
    )
    rows = [
        ("own memory of all ranks", gib, whole_gib, "GiB"),
        ("seconds of the slowest", seconds, whole_seconds, "s"),
    ]
    comparisons = [
        Comparison(name=n, ours=a, theirs=b, unit=unit, against="whole loads") for n, a, b, unit in rows
    ]
    report("loading", comparisons, arguments.json)


if __name__ == "__main__":
    main()
