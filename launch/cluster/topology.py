"""Who does what on the nodes that an attempt got: retrievers first, then rollout servers, then trainers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.hostfile import Host, read_hostfile, render_hostfile
from launch.cluster.layout import LayoutConfig
from megatron_sd.errors import ConfigError

NUM_PORTS = 100  # attempts in a row do not share a port that the last one may still hold


@dataclass(frozen=True, kw_only=True)
class Topology:
    """trainers, rollouts, retrievers: hosts and, as slots, their ranks or servers. first_address: of the
    first node of all. master: address and port where the ranks meet. arguments: of the trainers' command
    line, beside the configuration file."""

    trainers: tuple[Host, ...]
    rollouts: tuple[Host, ...]
    retrievers: tuple[Host, ...]
    first_address: str
    master: tuple[str, int]
    arguments: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Training ranks."""
        return sum(host.num_slots for host in self.trainers)

    @property
    def nodes(self) -> tuple[Host, ...]:
        """All, in the order in which they were given."""
        return (*self.retrievers, *self.rollouts, *self.trainers)

    def hostfile(self) -> str:
        """DeepSpeed's, of the trainers."""
        return render_hostfile(self.trainers)

    def variables(self) -> dict[str, str]:
        """What the job's shell needs."""
        roles = {
            "TRAINER_HOSTS": self.trainers,
            "ROLLOUT_HOSTS": self.rollouts,
            "RETRIEVER_HOSTS": self.retrievers,
        }
        return {name: ",".join(host.name for host in hosts) for name, hosts in roles.items()} | {
            "FIRST_ADDR": self.first_address,
            "MASTER_ADDR": self.master[0],
            "MASTER_PORT": str(self.master[1]),
            "MEGATRON_SD_WORLD_SIZE": str(self.world_size),
            "SERVERS_PER_NODE": str(self.rollouts[0].num_slots if self.rollouts else 0),
        }

    def to_json(self) -> str:
        """For people, and for comparing attempts."""
        return json.dumps(dataclasses.asdict(self) | {"world_size": self.world_size}, indent=1)


def find_topology(layout: LayoutConfig, config: Mapping[str, Any], attempt: int) -> Topology:
    """On this machine, on the hostfile's, or on the nodes that SLURM gave. config: the run's, resolved.

    Raises ConfigError when there are other nodes than the layout wants.
    """
    num_slots = layout.ranks_per_node or 1
    if layout.cluster == "local":
        hosts, addresses = (Host(name="localhost", num_slots=num_slots),), {"localhost": "127.0.0.1"}
    elif layout.cluster == "hosts":
        hosts = read_hostfile(Path(layout.hostfile or ""))
        addresses = {host.name: host.name for host in hosts}
    else:
        names, addresses = slurm_nodes(os.environ)
        hosts = tuple(Host(name=name, num_slots=num_slots) for name in names)
    if len(hosts) != layout.num_nodes:
        raise ConfigError(
            f"nodes: found {len(hosts)} ({', '.join(h.name for h in hosts)}), expected {layout.num_nodes}"
        )
    return assign(hosts, addresses, layout, config, attempt=attempt)


def assign(
    hosts: Sequence[Host],
    addresses: Mapping[str, str],
    layout: LayoutConfig,
    config: Mapping[str, Any],
    *,
    attempt: int,
) -> Topology:
    """Roles by the hosts' order."""
    num_retrievers, num_servers = layout.retriever_nodes, layout.retriever_nodes + layout.rollout_nodes
    per_node = 0
    if layout.rollout_nodes:
        per_node = max(layout.gpus_per_node, 1) // config["rollout"]["vllm"]["tensor_parallel_size"]
    retrievers = tuple(Host(name=h.name, num_slots=1) for h in hosts[:num_retrievers])
    rollouts = tuple(Host(name=h.name, num_slots=per_node) for h in hosts[num_retrievers:num_servers])
    trainers = tuple(hosts[num_servers:])
    arguments: list[str] = []
    if rollouts:
        urls = [
            f"http://{addresses[h.name]}:{layout.vllm_port + n}" for h in rollouts for n in range(h.num_slots)
        ]
        arguments.append(f"--rollout.vllm.urls={json.dumps(urls)}")
    if rollouts or len(trainers) > 1:
        arguments.append(f"--publish.host={addresses[trainers[0].name]}")
    if retrievers:
        urls = [f"http://{addresses[h.name]}:{layout.retriever_port}" for h in retrievers]
        arguments += ["--retriever.corpus=null", f"--retriever.endpoints={json.dumps(urls)}"]
    master = addresses[trainers[0].name], layout.master_port + attempt % NUM_PORTS
    return Topology(
        trainers=trainers,
        rollouts=rollouts,
        retrievers=retrievers,
        first_address=addresses[hosts[0].name],
        master=master,
        arguments=tuple(arguments),
    )


def slurm_nodes(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Names of the job's nodes in SLURM's order, and their addresses: two calls of scontrol, however many
    nodes.

    Raises ConfigError outside a job.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError(
            "SLURM_JOB_NODELIST: found nothing, expected the nodes of a job: submit the script by sbatch"
        )
    names = _scontrol("show", "hostnames", nodes).split()
    return names, node_addresses(_scontrol("--oneliner", "show", "node", nodes))


def node_addresses(text: str) -> dict[str, str]:
    """From `scontrol --oneliner show node`.

    >>> node_addresses("NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1")
    {'n1': '10.0.0.1'}
    """
    return dict(re.findall(r"^NodeName=(\S+).*?\bNodeAddr=(\S+)", text, re.MULTILINE))


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
