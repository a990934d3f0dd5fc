"""Publishing about 200 M parameters from 2 ZeRO-3 ranks to 2 tensor-parallel workers, all in processes of
this machine.

    python -m benchmarks.training.publish [--json FILE] [--rounds N]

ours: each worker's shard from the ranks that own it, over shared memory and over gloo. broadcast: every
parameter gathered on all ranks, broadcast whole by rank 0 to all workers, each of which keeps its part
(what OpenRLHF does). reload: gathered in buckets, handed whole to all workers in shared memory, each of
which loads its part. Random Qwen2 in bfloat16; workers are plain tensors. Figures are medians of wall time
over interleaved rounds, and bytes that cross from one process to another.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

from benchmarks.baseline import Comparison, report
from benchmarks.tiny_model import write_model
from megatron_sd.rollout.engine import Delivery

if TYPE_CHECKING:
    from megatron_sd.resharding.receiver import ShardReceiver

NUM_RANKS, NUM_WORKERS = 2, 2
VOCABULARY, HIDDEN, LAYERS = 32_768, 1024, 10
BUCKET_BYTES = 64 << 20
WIRES = ("shared_memory", "gloo")
METHODS = (*WIRES, "broadcast", "reload")
RESULT = "RESULT "
TIMEOUT_S = 120


class Party:
    """This process among trainer ranks (first) and workers, and the groups that all methods need."""

    def __init__(self, number: int, port: int):
        self.number = number
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
        self._all = self.group("all", number, NUM_RANKS + NUM_WORKERS)
        self.root = None  # of rank 0 and the workers
        if number == 0 or number >= NUM_RANKS:
            self.root = self.group("root", max(number - NUM_RANKS + 1, 0), NUM_WORKERS + 1)

    def group(self, name: str, rank: int, size: int) -> dist.ProcessGroup:
        """A gloo group beside DeepSpeed's."""
        return dist.ProcessGroupGloo(
            dist.PrefixStore(name, self.store), rank, size, timedelta(seconds=TIMEOUT_S)
        )

    def barrier(self) -> None:
        """Everybody is here."""
        self._all.barrier().wait()

    def run(self, methods: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
        """Seconds of every method and round, from everybody ready to everybody done; the first round warms
        up."""
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for n in range(rounds + 1):
            for method in METHODS:
                self.barrier()
                started = time.perf_counter()
                methods[method]()
                self.barrier()
                if n > 0:
                    seconds[method].append(time.perf_counter() - started)
        return seconds


def receive_next(receiver: ShardReceiver, deliveries: Iterator[int]) -> None:
    """The next of the trainer's deliveries, whose version is always 0."""
    receiver.receive(0, next(deliveries))


# ---- a trainer rank ----


class NoWorkers:
    """ShardedEngine of a rank that owns no worker: here they run by themselves."""

    def begin_update(self) -> None:
        """Nothing to forget."""

    def start_receiving(self, delivery: Delivery) -> Future:
        """Nothing to wait for."""
        done: Future = Future()
        done.set_result(None)
        return done

    def finish_update(self, policy_version: int) -> None:
        """Nothing to open."""

    def cancel_update(self) -> None:
        """Nothing to reopen."""


def train(party: Party, model: Path, rounds: int) -> None:
    """Rank 0 prints the seconds of each round, the bytes that ours moves and those of the model."""
    from megatron_sd.building.policy import build_policy
    from megatron_sd.config.load import load
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import join_world
    from megatron_sd.resharding.staging import SharedMemory
    from megatron_sd.training.publisher import ShardPublisher

    world = join_world()
    required = {
        "run_dir": model / "run",
        "model.path": model,
        "data.train": "none",
        "retriever.corpus": "none",
    }
    settings = [f"--{key}={value}" for key, value in (required | {"policy_loss.kl_weight": 0}).items()]
    config = load(settings)
    policy = build_policy(config, Parallel.of(config.update, world))
    publishers = {
        wire: ShardPublisher(
            policy,
            dataclasses.replace(config.publish, wire=wire),
            dtype=config.model.dtype,
            tp_size=NUM_WORKERS,
            num_replicas=1,
        )
        for wire in WIRES
    }
    plan = publishers["gloo"].plan
    whole = None
    if world.is_first:
        whole = SharedMemory(sum(spec.numel for spec in plan.source.parameters), torch.bfloat16)
        addresses = {wire: publisher.address for wire, publisher in publishers.items()}
        offer = {
            "addresses": addresses,
            "whole": whole.token,
            "config": json.loads(policy.model.config.to_json_string(False)),
        }
        party.store.set(
            "offer", json.dumps(offer | {"names": [spec.name for spec in plan.source.parameters]})
        )
    methods = {
        wire: functools.partial(publisher.publish, policy, NoWorkers(), 0)
        for wire, publisher in publishers.items()
    }
    methods["broadcast"] = functools.partial(broadcast_whole, party, policy)
    methods["reload"] = functools.partial(
        hand_over_whole, party, policy, None if whole is None else whole.tensor
    )
    seconds = party.run(methods, rounds)
    if world.is_first:
        moved = plan.item_bytes * sum(layout.numel for layout in plan.workers)
        model_bytes = plan.item_bytes * sum(spec.numel for spec in plan.source.parameters)
        print(f"{RESULT}{json.dumps([seconds, moved, model_bytes])}")


def broadcast_whole(party: Party, policy) -> None:
    """Every parameter gathered on all ranks, and sent by rank 0 to all workers."""
    import deepspeed

    for _, parameter in policy.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if party.root is not None:
                party.root.broadcast(as_bytes(parameter), root=0).wait()


def hand_over_whole(party: Party, policy, whole: torch.Tensor | None) -> None:
    """Parameters gathered in buckets; rank 0 writes them to memory that the workers read."""
    from megatron_sd.training.publisher import gathered_buckets

    start = 0
    for bucket in gathered_buckets(policy.named_parameters(), BUCKET_BYTES):
        for _, tensor in bucket if whole is not None else ():
            whole[start : start + tensor.numel()].copy_(tensor.view(-1))
            start += tensor.numel()
    party.barrier()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; gloo knows no bfloat16."""
    return tensor.detach().view(-1).view(torch.uint8)


# ---- a worker ----


def serve(party: Party, rounds: int) -> None:
    """Take every version by every method, and check at the end that all gave the same tensors."""
    from megatron_sd.resharding.layout import WorkerId
    from megatron_sd.resharding.names import whole_parameters, worker_layouts
    from megatron_sd.resharding.receiver import ShardReceiver
    from megatron_sd.resharding.staging import open_shared_memory

    offer = json.loads(party.store.get("offer"))
    worker = WorkerId(replica=0, tp_rank=party.number - NUM_RANKS, tp_size=NUM_WORKERS)
    layout = worker_layouts(offer["config"], tp_size=NUM_WORKERS, dtype="bfloat16")[worker.tp_rank]
    specs = {spec.name: spec for spec in whole_parameters(offer["config"], dtype="bfloat16")}
    shapes = [(name, specs[name].shape, specs[name].numel) for name in offer["names"]]
    num_elements, device = sum(numel for *_, numel in shapes), torch.device("cpu")
    whole = open_shared_memory(offer["whole"], num_elements, torch.bfloat16, device)
    live = {
        method: {
            t.spec.name: torch.full(t.spec.shape, float(n), dtype=torch.bfloat16) for t in layout.tensors
        }
        for n, method in enumerate(METHODS)
    }
    pieces = {
        piece.parameter: (tensor.spec.name, piece) for tensor in layout.tensors for piece in tensor.pieces
    }

    def keep(method: str, name: str, full: torch.Tensor) -> None:
        target, piece = pieces[name]
        part = full[slice(*piece.rows)]
        part = part[:, slice(*piece.columns)] if full.dim() == 2 else part
        live[method][target][piece.at_row : piece.at_row + len(part)].copy_(part)

    def broadcast() -> None:
        for name, shape, _ in shapes:
            full = torch.empty(shape, dtype=torch.bfloat16)
            party.root.broadcast(as_bytes(full), root=0).wait()
            keep("broadcast", name, full)

    def reload() -> None:
        party.barrier()
        start = 0
        for name, shape, numel in shapes:
            keep("reload", name, whole[start : start + numel].view(shape))
            start += numel

    methods = {"broadcast": broadcast, "reload": reload}
    for wire, address in offer["addresses"].items():
        receiver = ShardReceiver(live[wire], worker=worker, address=address, timeout_s=TIMEOUT_S)
        methods[wire] = functools.partial(receive_next, receiver, itertools.count(1))
    party.run(methods, rounds)
    for method in METHODS[1:]:
        for name, expected in live[METHODS[0]].items():
            assert torch.equal(live[method][name], expected), (method, name)


def main() -> None:
    """Start all processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--party", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.party is not None:
        torch.set_num_threads(1)
        party = Party(arguments.party, arguments.port)
        train(party, arguments.model, arguments.rounds) if party.number < NUM_RANKS else serve(
            party, arguments.rounds
        )
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        master_port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), vocabulary=VOCABULARY, hidden=HIDDEN, layers=LAYERS)
        processes = []
        for number in range(NUM_RANKS + NUM_WORKERS):
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--party",
                number,
                "--port",
                store.port,
                "--model",
                directory,
            ]
            ranks = {
                "RANK": number,
                "WORLD_SIZE": NUM_RANKS,
                "LOCAL_RANK": number,
                "MASTER_ADDR": "127.0.0.1",
            }
            environment = (
                {**ranks, "MASTER_PORT": master_port, "OMP_NUM_THREADS": 1} if number < NUM_RANKS else {}
            )
            processes.append(
                subprocess.Popen(
                    [*map(str, command), "--rounds", str(arguments.rounds)],
                    env=os.environ | {key: str(value) for key, value in environment.items()},
                    stdout=subprocess.PIPE if number == 0 else None,
                    text=True,
                )
            )
        output, _ = processes[0].communicate()
        assert not any(process.wait() for process in processes), "a process failed"
    result = next(line for line in output.splitlines() if line.startswith(RESULT))
    compare(*json.loads(result.removeprefix(RESULT)), json_path=arguments.json)


def compare(seconds: dict[str, list[float]], moved: int, model: int, json_path: Path | None) -> None:
    """Print medians and bytes."""
    median = {method: statistics.median(values) for method, values in seconds.items()}
    gathered = (NUM_RANKS - 1) * model
    theirs_bytes = {"broadcast": gathered + NUM_WORKERS * model, "reload": gathered + model}
    comparisons = [
        Comparison(
            name=f"publish {model // 2_000_000} M parameters, {wire}",
            ours=median[wire],
            theirs=median[theirs],
            unit="s",
            against=theirs,
        )
        for wire in WIRES
        for theirs in theirs_bytes
    ]
    comparisons += [
        Comparison(
            name="bytes between processes", ours=moved / 1e6, theirs=total / 1e6, unit="MB", against=name
        )
        for name, total in theirs_bytes.items()
    ]
    report("publish", comparisons, json_path)


if __name__ == "__main__":
    main()
