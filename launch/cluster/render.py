"""From a layout to the files of a launch: script, node scripts, configuration; pure text, nothing is
started here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import yaml

from launch.cluster.job import Job
from launch.cluster.layout import LayoutConfig, ranks_per_node
from launch.planner.memory import GIB, checkpoint_bytes
from launch.planner.models import model_config
from megatron_sd.config import Config
from megatron_sd.errors import ConfigError, MegatronSdError
from megatron_sd.resharding.names import model_shape

_PLACE = re.compile(r"@(\w+)@")


def render(template: str, values: Mapping[str, str | None]) -> str:
    """Each @name@ replaced by its value. A line with a value of None is left out.

    >>> render("--time=@time@\\n--qos=@qos@\\n", {"time": "1:00", "qos": None})
    '--time=1:00\\n'
    """
    lines = []
    for line in template.splitlines():
        names = _PLACE.findall(line)
        if unknown := [name for name in names if name not in values]:
            raise ConfigError(
                f"template line {line!r}: found @{unknown[0]}@, expected one of {', '.join(values)}"
            )
        if all(values[name] is not None for name in names):
            lines.append(_PLACE.sub(lambda place: values[place[1]] or "", line))
    return "\n".join(lines) + "\n"


def render_files(layout: LayoutConfig, job: Job, launch_dir: Path) -> dict[str, str]:
    """File name in launch_dir -> text. job.sbatch or job.sh is what is started; it reads the others."""
    layout = dataclasses.replace(layout, ranks_per_node=ranks_per_node(layout, job.config))
    if layout.hostfile:
        layout = dataclasses.replace(layout, hostfile=str(Path(layout.hostfile).resolve()))
    values = _values(layout, job, launch_dir)
    values["header"] = render(_template("slurm/header.sbatch"), values).rstrip()
    name, template = script_of(layout)
    rendered = {name: render(_template(template), values)}
    for shell in ("common.sh", "node.sh", "server.sh", "doctor.sh"):
        rendered[shell] = render(_template(f"slurm/{shell}"), values)
    rendered["config.yaml"] = job.text
    rendered["layout.yaml"] = yaml.safe_dump(
        dataclasses.asdict(layout) | {"sbatch": list(layout.sbatch)}, sort_keys=False
    )
    return rendered


def script_of(layout: LayoutConfig) -> tuple[str, str]:
    """Name and template of the script that is started."""
    if layout.cluster != "slurm":
        return "job.sh", "local.sh"
    if layout.nodes == 0:
        return "job.sbatch", "slurm/retriever.sbatch"
    kind = "split" if layout.rollout_nodes + layout.retriever_nodes else "colocated"
    return "job.sbatch", f"slurm/{kind}.sbatch"


def _values(layout: LayoutConfig, job: Job, launch_dir: Path) -> dict[str, str | None]:
    config = job.config
    quoted = {"directory": str(Path.cwd()), "python": sys.executable, "launch_dir": str(launch_dir)}
    plain = {
        "job_name": f"sd-search-{Path(config.run_dir).name}",
        "module": job.module,
        "num_nodes": str(layout.num_nodes),
        "gpus_per_node": str(layout.gpus_per_node) if layout.gpus_per_node else None,
        "tensor_parallel_size": str(config.rollout.vllm.tensor_parallel_size),
        "cpu": "" if layout.gpus_per_node else "--cpu",
        "corpus": shlex.quote(config.retriever.corpus or ""),
        "sbatch": "\n".join(f"#SBATCH {option}" for option in layout.sbatch) or None,
        "doctor": _doctor_line(layout) if layout.doctor else None,
        "setup": layout.setup,
        "endpoints": shlex.quote(json.dumps(config.retriever.endpoints)),
        "checkpoints": shlex.quote(str(Path(config.run_dir).resolve() / "checkpoints")),
        "checkpoint_gib": str(_checkpoint_gib(config)),
        "num_checkpoints": str(config.checkpoint.keep + 1),
        "gpus_wanted": str(layout.gpus_per_node or "null"),
        "on_host": 'bash -c "$2"' if layout.cluster == "local" else f'{layout.remote_shell} "$1" "$2"',
    }
    same = ("time", "partition", "account", "qos")
    numbers = ("grace_s", "vllm_port", "retriever_port")
    return (
        {name: shlex.quote(value) for name, value in quoted.items()}
        | plain
        | {name: getattr(layout, name) for name in same}
        | {name: str(getattr(layout, name)) for name in numbers}
    )


def _checkpoint_gib(config: Config) -> int:
    """Of one checkpoint on disk, rounded up; 0 for a model whose sizes nobody knows."""
    try:
        shape = model_shape(model_config(config.model.path))
    except MegatronSdError:
        return 0
    return math.ceil(checkpoint_bytes(shape, config) / GIB)


def _doctor_line(layout: LayoutConfig) -> str:
    return (
        f'{"on_all_nodes" if layout.cluster == "slurm" else "on_all_hosts"} "$LAUNCH_DIR/doctor.sh" ||'
        " code=$?"
    )


def _template(name: str) -> str:
    return (files("launch") / name).read_text(encoding="utf-8")
