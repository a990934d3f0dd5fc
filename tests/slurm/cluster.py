"""A real SLURM on this machine: munged, slurmctld, and one slurmd for each virtual node, all under one
directory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INSTALL = Path(__file__).with_name("install.sh")
START_S = 60
CREDENTIAL_S = 2
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={credential_s}
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
MinJobAge=600
SchedulerParameters=sched_interval=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool-%n
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdLogFile={directory}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=node[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no SLURM can run here; empty when it can. Installs it where that is possible."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root here"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if shutil.which("slurmctld") is None:
        if shutil.which("apt-get") is None:
            return "no slurmctld, and no apt-get to install it"
        done = subprocess.run(["bash", str(INSTALL)], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"SLURM could not be installed: {done.stderr.strip().splitlines()[-1:]}"
    lacking = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch", "scontrol") if shutil.which(name) is None
    ]
    return f"{', '.join(lacking)} not found" if lacking else ""


@contextmanager
def slurm(directory: Path, *, num_nodes: int) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands speak to a fresh cluster of `num_nodes` nodes; down again
    at the end."""
    for name in ("state", *(f"spool-node{n}" for n in range(1, num_nodes + 1))):
        (directory / name).mkdir(parents=True)
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = free_ports(num_nodes + 1)
    host = socket.gethostname().split(".")[0]
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    nodes = "\n".join(
        f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=2"
        f" RealMemory={memory_mb // num_nodes} State=UNKNOWN"
        for n in range(1, num_nodes + 1)
    )
    places = {"directory": directory, "host": host, "control_port": ports[0]}
    text = CONFIGURATION.format(**places, nodes=nodes, num_nodes=num_nodes, credential_s=CREDENTIAL_S)
    (directory / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
    try:
        munge = {
            name: str(directory / f"munge{suffix}")
            for name, suffix in (("socket", ".socket"), ("pid-file", "d.pid"))
        }
        munge |= {
            "key-file": str(key),
            "log-file": str(directory / "munged.log"),
            "seed-file": str(directory / "munge.seed"),
        }
        start(["munged", "--force", *(f"--{name}={value}" for name, value in munge.items())], environment)
        start(["slurmctld", "-c"], environment)
        for n in range(1, num_nodes + 1):
            start(["slurmd", "-N", f"node{n}"], environment)
        wait_until_idle(environment)
        yield environment
    finally:
        stop(directory, environment)


def start(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=START_S
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def wait_until_idle(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if set(found.stdout.split()) == {"idle"}:
            return
        assert time.monotonic() < deadline, f"SLURM did not come up: {found.stdout}{found.stderr}"
        time.sleep(0.5)


def stop(directory: Path, environment: dict[str, str]) -> None:
    """End its jobs, then its daemons, by the pids that they wrote."""
    subprocess.run(
        ["scancel", "--user=root"], env=environment, capture_output=True, check=False, timeout=START_S
    )
    time.sleep(1)
    paths = (*directory.glob("slurmd-*.pid"), directory / "slurmctld.pid", directory / "munged.pid")
    pids = [int(path.read_text()) for path in paths if path.exists()]
    # a slurmd in the middle of a launch does not hear the first
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
