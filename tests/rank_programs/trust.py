"""What goes wrong on a rank, on purpose. Functions that the nursery calls in every rank of a start; see
tests/trust.

`train` is the real training with one fault in it; `steps` and `commits` are updates and saves without
rollouts.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.distributed.collectives import gather_objects
from megatron_sd.distributed.world import join_world
from megatron_sd.durable import directories
from megatron_sd.errors import CheckpointError, NonFiniteError
from megatron_sd.records import Microbatch
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.train import main
from megatron_sd.training.policy import Policy
from megatron_sd.training.policy_module import RowHead, TeacherRows
from megatron_sd.training.state.checkpoint import Checkpoints
from tests.rank_programs.update_steps import Order, batch_of, full_parameters
from tests.training.fakes import make_config, make_policy

TAKE = TermWeights(policy=1.0, distill_spread=0.5, distill_no_spread=0.5)


# ---- training with a fault ----


def stuck() -> None:
    """By this name it is found in the stacks."""
    time.sleep(3600)


def hold_the_interpreter() -> None:
    """A native call that never returns and lets no other thread run."""
    import ctypes

    ctypes.PyDLL(None).sleep(3600)


def broken() -> None:
    raise RuntimeError("broken on purpose")


def dead() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], None]] = {
    "stuck": stuck,
    "held": hold_the_interpreter,
    "broken": broken,
    "dead": dead,
}
PLACES = {"rollout": (Rollouter, "run"), "update": (Policy, "accumulate"), "save": (Checkpoints, "save")}


def train(order: dict[str, Any]) -> int:
    """`megatron_sd.train`; order: argv, and of the fault: rank, kind, place, and which call of the place it
    meets.

    The time of the fault goes into order["times"], a file. kind nan: advantages of `count` steps'
    microbatches."""
    if int(os.environ["RANK"]) == order["rank"]:
        if order["kind"] == "nan":
            _poison_advantages(order["call"], order["count"])
        else:
            _meet(order)
    return main(order["argv"])


def _meet(order: dict[str, Any]) -> None:
    owner, name = PLACES[order["place"]]
    original, calls = getattr(owner, name), 0

    def meet(self, *positional: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == order["call"]:
            Path(order["times"]).write_text(str(time.time()))
            FAULTS[order["kind"]]()
        return original(self, *positional, **keywords)

    setattr(owner, name, meet)


def _poison_advantages(first: int, count: int) -> None:
    """In the microbatches before the first-th call of Policy.step, and of count - 1 further ones."""
    original, step, steps = Policy.accumulate, Policy.step, 0

    def accumulate(self: Policy, microbatch: Microbatch, totals: Any, weights: Any) -> None:
        if first <= steps + 1 < first + count:
            microbatch = replace(microbatch, advantages=microbatch.advantages * float("nan"))
        original(self, microbatch, totals, weights)

    def counted(self: Policy, *positional: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, *positional)

    Policy.accumulate, Policy.step = accumulate, counted


# ---- updates with something that is not finite ----


def poison_head(part: str, value: float) -> Callable[[], None]:
    """The head's hidden states of the student or the teacher get a value from now on; what undoes it."""
    original = RowHead.forward

    def forward(self: RowHead, hidden: torch.Tensor, teacher: TeacherRows, *others: Any) -> Any:
        if part == "student":
            hidden = hidden + torch.full_like(hidden, value)
        else:
            teacher = teacher._replace(hidden=teacher.hidden + torch.full_like(teacher.hidden, value))
        return original(self, hidden, teacher, *others)

    RowHead.forward = forward
    return lambda: setattr(RowHead, "forward", original)


def poison_gradients(value: float) -> Callable[[], None]:
    """The loss stays as it is, its gradient does not."""
    original = Policy.accumulate

    def accumulate(self: Policy, *arguments: Any) -> None:
        backward = self.engine.backward

        def poisoned(loss: torch.Tensor, **options: Any) -> Any:
            return backward(loss + (loss - loss.detach()) * value, **options)

        self.engine.backward = poisoned
        original(self, *arguments)
        self.engine.backward = backward

    Policy.accumulate = accumulate
    return lambda: setattr(Policy, "accumulate", original)


POISONS: dict[str, Callable[[float], Callable[[], None]]] = {
    "logits": lambda value: poison_head("student", value),
    "teacher": lambda value: poison_head("teacher", value),
    "gradients": poison_gradients,
}


def steps(order: dict[str, Any]) -> int:
    """One healthy step, then one with each poison on rank 1 alone, then a healthy one. Writes the outcome
    to order["output"]."""
    world = join_world()
    config = make_config(
        Path(order["model"]), update={"zero_stage": order["stage"]}, distill={"measure_every": 0}
    )
    policy, outcome = make_policy(config, world), {}
    _take(policy)
    for name in (*POISONS, "advantages", "old_logprobs"):
        for value in (float("nan"), float("-inf")):
            before = full_parameters(policy)
            refused = _refused(policy, name, value if world.rank == order["rank"] else None)
            after = full_parameters(policy)
            same = all(torch.equal(before[key], after[key]) for key in before)
            hashes = gather_objects(world, [float(tensor.double().sum()) for tensor in after.values()])
            outcome[f"{name} {value}"] = {
                "refused": refused,
                "unmoved": same,
                "ranks_agree": all(h == hashes[0] for h in hashes),
            }
    version = policy.version
    _take(policy)
    outcome["healthy"] = {"moved_on": policy.version == version + 1 == 2}
    Path(f"{order['output']}.{world.rank}").write_text(json.dumps(outcome))
    return 0


def _take(policy: Policy, field: str | None = None, value: float | None = None) -> None:
    batch = batch_of(Order(model=""), policy.world, "token")
    for microbatch in batch:
        if field is not None and value is not None:
            microbatch = replace(microbatch, **{field: getattr(microbatch, field) * 0 + value})
        policy.accumulate(microbatch, batch.totals, TAKE)
    policy.step()


def _refused(policy: Policy, name: str, value: float | None) -> bool:
    """Whether the step was refused. value: None on the ranks that are healthy."""
    undo = POISONS[name](value) if name in POISONS and value is not None else lambda: None
    try:
        _take(policy, None if name in POISONS else name, value)
    except NonFiniteError:
        return True
    finally:
        undo()
    return False


# ---- saves with a fault at every operation on the disk ----


class Disk:
    """Counts what this process does under a directory, and lets one operation fail, or kills the process
    there."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "shutil.copyfile")

    def __init__(self, root: Path):
        self._root = str(root)
        self._names: list[str] | None = None
        self._fails_at, self._fault = 0, 0
        sys.addaudithook(self._audit)
        fsync = os.fsync
        directories.os.fsync = lambda descriptor: (self._count("fsync"), fsync(descriptor))[1]

    def watch(self, fails_at: int = 0, fault: int = 0) -> None:
        """From now on. fails_at: which operation, from 1; 0: none. fault: an errno; 0: SIGKILL."""
        self._names, self._fails_at, self._fault = [], fails_at, fault

    def rest(self) -> list[str]:
        """Watch no longer; what was done."""
        names, self._names = self._names or [], None
        return names

    def _audit(self, event: str, arguments: tuple) -> None:
        if self._names is not None and event in self.EVENTS and str(arguments[0]).startswith(self._root):
            self._count(event)

    def _count(self, name: str) -> None:
        if self._names is None:
            return
        self._names.append(name)
        if len(self._names) == self._fails_at:
            if self._fault == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self._fault, os.strerror(self._fault), "injected")


def commits(order: dict[str, Any]) -> int:
    """Saves with every fault of order["faults"] (names of errnos) at every operation of order["rank"];
    every `stride`-th."""
    world, root = join_world(), Path(order["root"])
    config = make_config(Path(order["model"]))
    policy, checkpoints = make_policy(config, world), Checkpoints(root, config, world, corpus_version="c")
    _take(policy)
    disk, step = Disk(root), 1
    disk.watch()
    checkpoints.save(policy, step=1, state={})
    checkpoints.save(policy, step=2, state={})
    step = 3
    disk.watch()
    checkpoints.save(policy, step=step, state={})  # prunes, as every later one will
    operations = gather_objects(world, disk.rest())[order["rank"]]
    outcome = {"operations": operations, "wrong": [], "saves": 0, "refused": 0}
    for name in order["faults"]:
        for place in range(1, len(operations) + 1, order["stride"]):
            step += 1
            disk.watch(place if world.rank == order["rank"] else 0, getattr(errno, name))
            raised = False
            try:
                checkpoints.save(policy, step=step, state={})
            except CheckpointError as error:
                raised = "injected" in str(error)
            disk.rest()
            outcome["saves"] += 1
            outcome["refused"] += raised
            problem = _problem(gather_objects(world, raised), root, step)
            if problem:
                outcome["wrong"].append(f"{name} at {place} ({operations[place - 1]}): {problem}")
    Path(f"{order['output']}.{world.rank}").write_text(json.dumps(outcome))
    return 0


def _problem(raised: list[bool], root: Path, step: int) -> str | None:
    """What is wrong after a save of `step` that met a fault: all ranks agree, and the newest checkpoint is
    whole."""
    newest = directories.committed(root)[0]
    if len(set(raised)) != 1:
        return f"ranks disagree: {raised}"
    if not raised[0] and newest != directories.directory_of(root, step):
        return "the fault was swallowed and nothing committed"
    if directories.find_damage(newest):
        return f"{newest.name}: {directories.find_damage(newest)}"
    if raised[0] and directories.staging_of(directories.directory_of(root, step)).exists():
        return "something half-written stays"
    return None


def killed_commit(order: dict[str, Any]) -> int:
    """Resume, save a step, and be killed (rank order["rank"]) at operation order["place"] of saving the
    next one."""
    world, root = join_world(), Path(order["root"])
    config = make_config(Path(order["model"]))
    policy, checkpoints = make_policy(config, world), Checkpoints(root, config, world, corpus_version="c")
    state = checkpoints.load(policy)
    step = state["step"] if state else 0
    if step == 0:
        _take(policy)
    checkpoints.save(policy, step=step + 1, state={})
    disk = Disk(root)
    disk.watch(order["place"] if world.rank == order["rank"] else 0)
    checkpoints.save(policy, step=step + 2, state={})
    return 0
