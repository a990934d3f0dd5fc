"""`sd-search launch`: a run on a machine, on several, or in SLURM's queue. Checks the layout, writes
RUN/launch, starts it.

    sd-search launch --recipe 72b-64gpu --dry-run --model.path models/Qwen2.5-72B --run_dir runs/72b
    sd-search launch --program sft --cluster slurm --config sft.yaml
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from launch.cluster.hostfile import Host, read_environment, read_hostfile, render_hostfile
from launch.cluster.job import JOBS, Job
from launch.cluster.layout import LayoutConfig, check_layout, ranks_per_node
from launch.cluster.render import render_files, script_of
from launch.options import split_options
from launch.planner.estimate import check_memory
from launch.planner.microbatch import settle_on_nodes
from launch.planner.models import model_config
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError, MegatronSdError


def main(argv: Sequence[str]) -> None:
    """Raises ConfigError for a run that could not work where it is sent, MegatronSdError when it ends badly
    or is not taken."""
    layout, job = read_launch_options(argv)
    launch_dir = Path(job.config.run_dir).resolve() / "launch"
    remarks = check_launch(layout, job)
    rendered = write_launch(layout, job, launch_dir)
    for remark in remarks:
        print(f"note: {remark}")
    script = launch_dir / script_of(layout)[0]
    if layout.dry_run:
        print(describe(rendered, layout, job, launch_dir))
        return
    command = ["sbatch", str(script)] if layout.cluster == "slurm" else ["bash", str(script)]
    try:
        done = subprocess.run(command, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"cluster: found {layout.cluster}, but no `{command[0]}` here; --dry-run only writes"
        ) from error
    if done.returncode:
        raise MegatronSdError(
            f"{' '.join(command)} ended with exit code {done.returncode}; its own message stands above"
        )


def read_launch_options(argv: Sequence[str]) -> tuple[LayoutConfig, Job]:
    """The layout's options (and `--layout FILE.yaml`), and with what is left the run. `--recipe NAME` stands
    for both files of launch/configs. Raises ConfigError, and DataError for episodes that are none."""
    own, rest = split_options(expand_recipe(argv), LayoutConfig, {"layout": "config"})
    layout = parse(LayoutConfig, own, "sd-search launch")
    if layout.program != "train" and any(word.partition("=")[0] == "--recipe" for word in argv):
        raise ConfigError(
            f"--recipe: found one with program {layout.program}, expected none, since recipes are of train: "
            "give --config, and --layout FILE or its options"
        )
    # auto would speak of this machine, not of the nodes
    there = ["--model.dtype=bfloat16"] if layout.gpus_per_node else []
    words = [*there, *rest]
    job = JOBS[layout.program](words)
    if settled := settle_on_nodes(layout, job.config):
        job = JOBS[layout.program]([*words, *settled])
    return layout, job


def expand_recipe(argv: Sequence[str]) -> list[str]:
    """`--recipe NAME` becomes `--layout .../NAME.layout.yaml --config .../NAME.yaml`. Raises ConfigError
    that lists them."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        if word.partition("=")[0] != "--recipe":
            expanded.append(word)
            continue
        name = word.partition("=")[2] or next(words, "")
        directory = Path(str(files("launch"))) / "configs"
        known = sorted(path.name.removesuffix(".layout.yaml") for path in directory.glob("*.layout.yaml"))
        if name not in known:
            raise ConfigError(f"--recipe: found {name!r}, expected one of {', '.join(known)}")
        expanded += [f"--layout={directory / name}.layout.yaml", f"--config={directory / name}.yaml"]
    return expanded


def check_launch(layout: LayoutConfig, job: Job) -> tuple[str, ...]:
    """Remarks. Raises ConfigError for an impossible layout, a rank larger than its GPU, a bad hostfile or
    `.deepspeed_env`."""
    if layout.nodes == 0:
        return ()
    model = model_config(job.config.model.path)
    if layout.cluster == "hosts":
        hosts = read_hostfile(Path(layout.hostfile or ""))
        wanted = layout.nodes * ranks_per_node(layout, job.config)
        if (found := sum(host.num_slots for host in hosts)) != wanted or len(hosts) != layout.nodes:
            raise ConfigError(
                f"{layout.hostfile}: found {len(hosts)} machines with {found} slots, expected {layout.nodes}"
                f" with {wanted}: set nodes and ranks_per_node, or mend the file"
            )
    environment = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    if environment.exists():
        read_environment(environment)
    remarks = check_layout(layout, job, model)
    return (*remarks, *check_memory(layout, job, model))


def write_launch(layout: LayoutConfig, job: Job, launch_dir: Path) -> dict[str, str]:
    """Write the files of a launch; their texts by name."""
    rendered = render_files(layout, job, launch_dir)
    launch_dir.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.items():
        (launch_dir / name).write_text(text, encoding="utf-8")
    if layout.retriever_nodes:
        token = launch_dir / "retriever.token"
        token.touch(mode=0o600)
        if not token.read_text(encoding="utf-8"):
            token.write_text(os.urandom(16).hex() + "\n", encoding="utf-8")
    return rendered


def describe(rendered: dict[str, str], layout: LayoutConfig, job: Job, launch_dir: Path) -> str:
    """What --dry-run prints: script, hostfile, environment, resolved configuration."""
    name, _ = script_of(layout)
    num_ranks = ranks_per_node(layout, job.config)
    hosts = [Host(name=f"NODE{n}", num_slots=num_ranks) for n in range(layout.nodes)]
    hostfile = (
        Path(layout.hostfile).read_text(encoding="utf-8") if layout.hostfile else render_hostfile(hosts)
    )
    environment = f"MEGATRON_SD_WORLD_SIZE={layout.nodes * num_ranks}\n"
    parts = {
        str(launch_dir / name): rendered[name],
        "hostfile of an attempt": hostfile,
        "environment of an attempt, beside SLURM's": environment,
        str(launch_dir / "config.yaml"): rendered["config.yaml"],
    }
    return "\n".join(f"=== {title}\n{text}" for title, text in parts.items())
