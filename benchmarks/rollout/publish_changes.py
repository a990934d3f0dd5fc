"""Publishing a real model from 2 ranks to 2 tensor-parallel workers over gloo: what changed, against all
of it.

    python -m benchmarks.rollout.publish_changes MODEL_DIR --weights BEFORE AFTER [--rounds 5] [--json FILE]

BEFORE, AFTER: bfloat16 weights around an optimiser step, as benchmarks.rollout.weight_changes writes them.
The ranks hold shards as ZeRO-3 cuts them, workers are plain tensors, all are processes of this machine.
Every round publishes the other version by both sides in turn; at the end both sides' workers must hold the
same bits. Medians of seconds, from everybody ready to everybody done, and bytes as they are sent. A
machine's loopback is faster than most links between nodes; one of 10 Gbit/s, as root:

    unshare -n sh -c 'ip link set lo up && tc qdisc add dev lo root tbf rate 10gbit burst 4mb latency 50ms &&
        python -m benchmarks.rollout.publish_changes ...'
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from benchmarks.baseline import Comparison, report
from benchmarks.training.publish import NUM_RANKS, NUM_WORKERS, RESULT, TIMEOUT_S, Party
from megatron_sd.config import PublishConfig
from megatron_sd.resharding.layout import ShardLayout, WorkerId
from megatron_sd.resharding.names import whole_parameters, worker_layouts
from megatron_sd.resharding.plan import ReshardPlan, make_plan
from megatron_sd.resharding.receiver import ShardReceiver
from megatron_sd.resharding.sender import ShardSender
from megatron_sd.resharding.transport import MeetingPoint

SIDES = {"changes": True, "all": False}
WARM_UP = (
    2  # rounds: the first transfer of a session is dense on both sides, the next is the first that compares
)

Action = Callable[[int], int]  # by round: take part in a hand-over; its bytes


def plan_of(model_dir: Path) -> ReshardPlan:
    """Of the model in bfloat16."""
    model = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    source = ShardLayout(parameters=whole_parameters(model, dtype="bfloat16"), world_size=NUM_RANKS)
    workers = worker_layouts(model, tp_size=NUM_WORKERS, dtype="bfloat16")
    return make_plan(source, workers, num_replicas=1)


def shards(path: str, plan: ReshardPlan, rank: int) -> dict[str, torch.Tensor]:
    """What a rank owns of a file's weights."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for spec in plan.source.parameters:
            start, stop = plan.source.owned(spec.numel, rank)
            found[spec.name] = file.get_tensor(spec.name).view(-1)[start:stop].clone()
    return found


def rank_actions(party: Party, plan: ReshardPlan, weights: list[str]) -> dict[str, Action]:
    """A rank's part on each side; rank 0 hosts the meeting points."""
    versions = [shards(path, plan, party.number) for path in weights]
    actions: dict[str, Action] = {}
    for side, changes_only in SIDES.items():
        if party.number == 0:
            meeting = MeetingPoint.host("127.0.0.1", timeout_s=TIMEOUT_S)
            party.store.set(side, meeting.address)
        else:
            meeting = MeetingPoint.join(party.store.get(side).decode(), timeout_s=TIMEOUT_S)
        terms = PublishConfig(wire="gloo", changes_only=changes_only, timeout_s=TIMEOUT_S)
        sender = ShardSender(meeting, plan, terms, rank=party.number, device=torch.device("cpu"))
        actions[side] = functools.partial(send, sender, versions)
    return actions


def send(sender: ShardSender, versions: list[dict[str, torch.Tensor]], n: int) -> int:
    """Round n."""
    return sender.send(versions[n % 2], n)


def receive(receiver: ShardReceiver, n: int) -> int:
    """Round n; deliveries are counted from 1."""
    return receiver.receive(n, n + 1)


def worker_actions(party: Party, plan: ReshardPlan) -> tuple[dict[str, Action], dict[str, Any]]:
    """A worker's part on each side, and its tensors there."""
    worker = WorkerId(replica=0, tp_rank=party.number - NUM_RANKS, tp_size=NUM_WORKERS)
    actions: dict[str, Action] = {}
    live: dict[str, Any] = {}
    for side in SIDES:
        tensors = plan.layout_of(worker.number).tensors
        live[side] = {t.spec.name: torch.zeros(t.spec.shape, dtype=torch.bfloat16) for t in tensors}
        address = party.store.get(side).decode()
        receiver = ShardReceiver(live[side], worker=worker, address=address, timeout_s=TIMEOUT_S)
        actions[side] = functools.partial(receive, receiver)
    return actions, live


def take_part(number: int, port: int, model_dir: Path, weights: list[str], rounds: int) -> None:
    """One process. Rank 0 prints seconds by side and round, and by side the bytes of the last publish."""
    torch.set_num_threads(1)
    party, plan = Party(number, port), plan_of(model_dir)
    live: dict[str, Any] = {}
    if number < NUM_RANKS:
        actions = rank_actions(party, plan, weights)
    else:
        actions, live = worker_actions(party, plan)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    sent = dict.fromkeys(SIDES, 0)
    for n in range(WARM_UP + rounds):
        for side in SIDES:
            party.barrier()
            started = time.perf_counter()
            sent[side] = actions[side](n)
            party.barrier()
            seconds[side].append(time.perf_counter() - started)
    for name, value in live.get("all", {}).items():
        assert torch.equal(value.view(torch.int16), live["changes"][name].view(torch.int16)), name
    party.store.set(f"sent {number}", json.dumps(sent))
    if number == 0:
        everybody = [json.loads(party.store.get(f"sent {rank}")) for rank in range(NUM_RANKS)]
        total = {side: sum(own[side] for own in everybody) for side in SIDES}
        print(f"{RESULT}{json.dumps([{side: own[WARM_UP:] for side, own in seconds.items()}, total])}")
    party.barrier()


def main() -> None:
    """Start all processes, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--weights", nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--party", type=int, help="of one process, started by this program")
    parser.add_argument("--port", type=int, help="likewise")
    arguments = parser.parse_args()
    if arguments.model is None or arguments.weights is None:
        print("not measured: it needs a model's directory, and its weights before and after a step")
        return
    if arguments.party is not None:
        take_part(arguments.party, arguments.port, arguments.model, arguments.weights, arguments.rounds)
        return
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = [str(arguments.model), "--weights", *arguments.weights, "--rounds", str(arguments.rounds)]
    command = [sys.executable, "-m", __spec__.name, *own, "--port", str(store.port), "--party"]
    processes = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE if number == 0 else None, text=True)
        for number in range(NUM_RANKS + NUM_WORKERS)
    ]
    output, _ = processes[0].communicate()
    if any(process.wait() for process in processes):
        raise SystemExit("a process failed")
    seconds, sent = json.loads(output.rpartition(RESULT)[2])
    median = {side: statistics.median(values) for side, values in seconds.items()}
    spread = {side: f"{min(values):.2f} to {max(values):.2f} s" for side, values in seconds.items()}
    print(f"seconds of {arguments.rounds} rounds: {spread}")
    comparisons = [
        Comparison(name=name, ours=ours["changes"], theirs=ours["all"], unit=unit, against="all of it")
        for name, ours, unit in (
            ("publish what changed", median, "s"),
            ("bytes sent", {side: size / 1e6 for side, size in sent.items()}, "MB"),
        )
    ]
    report("publish_changes", comparisons, arguments.json)


if __name__ == "__main__":
    main()
