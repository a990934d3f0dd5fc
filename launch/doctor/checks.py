"""`sd-search doctor`: are these nodes fit for a run? In less than two minutes, and with the name of the
host at fault.

    sd-search doctor --run_dir runs/x                                            this machine
    sd-search doctor --run_dir runs/x --hosts a,b --number 0 --address a:29400   one process on each machine, numbered

Each node says what it has, reads the others' files on the shared file system, and times messages; then each
judges all alike.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor.node_facts import node_facts, unready_servers, unseen_canaries, write_canary
from megatron_sd.config.command_line import parse
from megatron_sd.distributed.preflight import Preflight
from megatron_sd.errors import ConfigError, MegatronSdError

CANARY_DIR = "doctor"
OLDEST_DRIVER = {"12": 525, "13": 580}  # by CUDA's major version, which drivers of one major version share
SLOW = 8  # times slower than most is a broken link; less is other traffic


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The nodes, and what a node must have. On several nodes every process gets the same options but
    `number`."""

    run_dir: str  # where the run will write
    hosts: tuple[str, ...] = ()  # in order; empty: this machine alone
    number: int = 0  # of this process's host among them
    address: str = "127.0.0.1:29400"  # of the first host, host:port
    endpoints: tuple[str, ...] = ()  # retrievers that must be ready
    gpus_per_node: int | None = None  # None: as many as most nodes have
    min_free_gib: float = 10.0  # below run_dir: room for two checkpoints
    min_shared_memory_gib: float = 1.0  # free in /dev/shm
    min_open_files: int = 1024  # that a process may have
    min_reduce_gb_s: float = 0.0  # of an all-reduce of 16 MiB; 0: only compared between nodes
    max_skew_s: float = 2.0  # between two clocks
    timeout_s: float = 100.0  # until a node that has not come is at fault


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a host."""

    host: str
    problem: str


def main(argv: Sequence[str]) -> None:
    """Print what was found; raises MegatronSdError naming the hosts at fault."""
    config = parse(DoctorConfig, argv, "sd-search doctor")
    hosts = config.hosts or (socket.gethostname(),)
    started = time.monotonic()
    if not 0 <= config.number < len(hosts):
        raise ConfigError(f"number: found {config.number}, expected that of one of the {len(hosts)} hosts")
    reports = examine(config, hosts)
    findings = judge(reports, hosts, config)
    if config.number == 0:
        for finding in findings:
            print(f"doctor: {finding.host}: {finding.problem}")
        print(
            f"doctor: {len(hosts)} nodes in {time.monotonic() - started:.1f} s: {len(findings)} problems",
            flush=True,
        )
    if findings:
        at_fault = ", ".join(sorted({finding.host for finding in findings}))
        raise MegatronSdError(
            f"not fit for a run: {at_fault}; node 0 prints the problems: mend these nodes, or leave them out"
        )


def examine(config: DoctorConfig, hosts: Sequence[str]) -> list[dict[str, Any] | None]:
    """What every host reports; None for one that did not come."""
    run_dir, nonce = Path(config.run_dir), uuid.uuid4().hex
    host, _, port = config.address.rpartition(":")
    place = (host, int(port)) if len(hosts) > 1 else ("127.0.0.1", 0)
    meeting = Preflight(place, number=config.number, size=len(hosts), timeout_s=config.timeout_s)
    own = node_facts(run_dir) | {"unready": unready_servers(config.endpoints)}
    write_canary(run_dir / CANARY_DIR, config.number, nonce)
    nonces = meeting.exchange("nonce", nonce)
    own["clock"] = time.time()  # all are here: the same moment, but for the network
    own["unseen"] = unseen_canaries(run_dir / CANARY_DIR, nonces)
    own["rates"], own["network"] = None, ""
    if None not in nonces:
        try:
            own["rates"] = meeting.rates()
        except MegatronSdError as error:
            own["network"] = str(error)
    reports = meeting.exchange("report", own)
    meeting.leave()
    return reports


def judge(
    reports: Sequence[dict[str, Any] | None], hosts: Sequence[str], config: DoctorConfig
) -> list[Finding]:
    """What is wrong, by host. Where hosts differ, the few are at fault."""
    present = {host: report for host, report in zip(hosts, reports, strict=True) if report is not None}
    findings = [
        Finding(
            host=host,
            problem=f"did not come within {config.timeout_s:g} s: not reachable, or its doctor did not start",
        )
        for host in hosts
        if host not in present
    ]
    for host, report in present.items():
        findings += [Finding(host=host, problem=problem) for problem in _own_problems(report, config)]
    return (
        findings
        + _differences(present)
        + _blind(present, hosts)
        + _slow(present, config)
        + _skewed(present, config)
    )


def _own_problems(report: dict[str, Any], config: DoctorConfig) -> list[str]:
    floors = [config.min_free_gib, config.min_shared_memory_gib]
    problems = [
        f"{path} has {free:.1f} GiB free, expected {floor:g} or more"
        for (path, free), floor in zip(report["free_gib"].items(), floors)
        if free < floor
    ]
    if report["open_files"] < config.min_open_files:
        problems.append(f"ulimit -n is {report['open_files']}, expected {config.min_open_files} or more")
    if config.gpus_per_node is not None and len(report["gpus"]) != config.gpus_per_node:
        problems.append(f"{len(report['gpus'])} GPUs, expected {config.gpus_per_node}")
    for number, gpu in enumerate(report["gpus"]):
        errors = gpu.get("ecc.errors.uncorrected.volatile.total", "0")
        if errors.isdecimal() and int(errors) > 0:
            problems.append(f"GPU {number} has {errors} uncorrected memory errors: reset it")
        if gpu.get("clocks_throttle_reasons.hw_slowdown") == "Active":
            problems.append(f"GPU {number} is slowed down by its hardware (heat or power)")
        problems += driver_problem(gpu.get("driver_version", ""), report.get("cuda", ""), number)
    problems += [report["network"]] if report["network"] else []
    return problems + [f"retriever not ready: {problem}" for problem in report["unready"]]


def driver_problem(driver: str, cuda: str, number: int) -> list[str]:
    """A driver that is too old for the CUDA that torch was built for; nothing where one of them is not known.

    >>> driver_problem("570.86.15", "13.0", 0)[0][:74]
    "GPU 0 has driver 570.86.15, expected 580 or newer for torch's CUDA 13.0: u"
    """
    needed, found = OLDEST_DRIVER.get(cuda.partition(".")[0]), driver.partition(".")[0]
    if needed is None or not found.isdecimal() or int(found) >= needed:
        return []
    return [
        f"GPU {number} has driver {driver}, expected {needed} or newer for torch's CUDA {cuda}: update the"
        " driver, or install torch for an older CUDA"
    ]


def _differences(present: dict[str, dict[str, Any]]) -> list[Finding]:
    """Versions, commit and GPUs that are not as on most hosts."""
    facts = {
        host: (
            {f"{name} version": version for name, version in report["versions"].items()}
            | {"commit": report["commit"], "GPUs": ", ".join(gpu["name"] for gpu in report["gpus"])}
        )
        for host, report in present.items()
    }
    findings = []
    for name in next(iter(facts.values()), {}):
        (usual, _), *_ = Counter(found[name] for found in facts.values()).most_common(1)
        findings += [
            Finding(
                host=host,
                problem=f"{name}: found {found[name] or 'none'}, expected {usual or 'none'} as on most nodes",
            )
            for host, found in facts.items()
            if found[name] != usual
        ]
    return findings


def _blind(present: dict[str, dict[str, Any]], hosts: Sequence[str]) -> list[Finding]:
    """A host that misses the files of most others does not share their file system; else the writer is to
    blame."""
    findings = []
    for number, host in enumerate(hosts):
        missed_by = [other for other, report in present.items() if number in report["unseen"]]
        unseen = present[host]["unseen"] if host in present else []
        if len(unseen) * 2 >= max(len(present) - 1, 1):
            names = ", ".join(hosts[other] for other in unseen)
            findings.append(
                Finding(
                    host=host, problem=f"does not see what {names} wrote to run_dir: no shared file system?"
                )
            )
        elif len(missed_by) * 2 > len(present) - 1:
            findings.append(
                Finding(host=host, problem=f"its file in run_dir is not seen by {', '.join(missed_by)}")
            )
    return findings


def _slow(present: dict[str, dict[str, Any]], config: DoctorConfig) -> list[Finding]:
    rates = {host: report["rates"] for host, report in present.items() if report["rates"]}
    if not rates:
        return []
    usual = statistics.median(link for _, link in rates.values())
    findings = [
        Finding(
            host=host,
            problem=f"messages of 16 MiB at {link:.2f} GB/s, expected about {usual:.2f} as on most nodes",
        )
        for host, (_, link) in rates.items()
        if link < usual / SLOW
    ]
    slowest = min(reduce for reduce, _ in rates.values())
    if slowest < config.min_reduce_gb_s:
        suspect = min(rates, key=lambda host: rates[host][1])
        problem = (
            f"all-reduce at {slowest:.2f} GB/s, expected {config.min_reduce_gb_s:g}; its messages are the"
            " slowest"
        )
        findings.append(Finding(host=suspect, problem=problem))
    return findings


def _skewed(present: dict[str, dict[str, Any]], config: DoctorConfig) -> list[Finding]:
    usual = statistics.median(report["clock"] for report in present.values()) if present else 0.0
    return [
        Finding(
            host=host,
            problem=(
                f"clock {report['clock'] - usual:+.1f} s from most, expected at most {config.max_skew_s:g}"
            ),
        )
        for host, report in present.items()
        if abs(report["clock"] - usual) > config.max_skew_s
    ]


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        main(sys.argv[1:])
    except MegatronSdError as failure:
        print(f"doctor: {failure}", file=sys.stderr)
        raise SystemExit(1) from failure
