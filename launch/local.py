"""Ranks on this machine: one process, or several through DeepSpeed's own launcher. Training, and the checks
before it."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from launch.presets import expand, listing
from megatron_sd.config import AUTO, Config
from megatron_sd.config.load import load
from megatron_sd.distributed.control import STARTER
from megatron_sd.door import STOPPED_EXIT_CODE
from megatron_sd.durable.run_lock import refuse_held
from megatron_sd.errors import ConfigError, MegatronSdError
from megatron_sd.machine import has_gpu, process_start
from megatron_sd.observability.sinks.packages import check_packages

TRAIN = "megatron_sd.train"
# what a rank may be
PROGRAMS = frozenset({TRAIN, "megatron_sd.sft", "eval.sample", "eval.gate.command", "eval.credit.main"})
_KILLED_CODES = frozenset({-9, 137, 247})  # by SIGKILL: as python, a shell and DeepSpeed's launcher say it
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(argv: Sequence[str]) -> None:
    """`sd-search train`: check the configuration here, then start the ranks; `--list`: the methods that
    `--as` knows. Raises what the ranks' failure means."""
    if "--list" in argv:
        print(listing())
        return
    num_ranks, rest = split_num_ranks(argv)
    rest, preset = expand(rest)
    config = load(rest)  # a typo ends here, once, before any process starts
    if settled := settle(config, num_ranks):
        rest = [*rest, *settled]
        config = load(rest)
    if preset is not None:
        print(f"as {preset.name}: {preset.about}; differs: {preset.differs}", flush=True)
    check_packages(config.log.sinks)
    refuse_held(Path(config.run_dir))
    remarks = check_memory(config, num_ranks)
    start_ranks(num_ranks, rest, remarks)


def gate(argv: Sequence[str]) -> None:
    """`sd-search gate`: in this process, or with --num-ranks on several ranks that share the questions."""
    _on_ranks("eval.gate.command", argv)


def sample(argv: Sequence[str]) -> None:
    """`sd-search sample`: in this process, or with --num-ranks on several ranks that share the questions."""
    _on_ranks("eval.sample", argv)


def sft(argv: Sequence[str]) -> None:
    """`sd-search sft`: check the configuration here, then start the ranks; names the model directory that
    they leave."""
    from megatron_sd.durable.directories import committed
    from megatron_sd.sft_config import load as load_sft
    from megatron_sd.sft_config import planned_config

    num_ranks, rest = split_num_ranks(argv)
    own, config = load_sft(rest)
    if settled := settle(planned_config(own, config), num_ranks):
        rest = [*rest, *settled]
        own, config = load_sft(rest)
    check_packages(config.log.sinks)
    refuse_held(Path(config.run_dir))
    remarks = check_memory(planned_config(own, config), num_ranks)
    start_ranks(num_ranks, rest, remarks, program="megatron_sd.sft")
    print(f"model {committed(Path(config.run_dir) / 'checkpoints')[0] / 'model'}")


def credit(argv: Sequence[str]) -> None:
    """`sd-search credit`: in this process, or with --num-ranks on several ranks that share the rollouts."""
    _on_ranks("eval.credit.main", argv)


def _on_ranks(program: str, argv: Sequence[str]) -> None:
    num_ranks, rest = split_num_ranks(argv)
    if num_ranks == 1:
        importlib.import_module(program).main(rest)
    else:
        start_ranks(num_ranks, rest, program=program)


def split_num_ranks(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The value of --num-ranks (1 without it) and the other arguments. Raises ConfigError when it is no
    whole number above 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num-ranks", "--num_ranks", nargs="?", default="1")
    known, rest = parser.parse_known_args(list(argv))
    found = known.num_ranks or "nothing"
    if not found.isdecimal() or int(found) < 1:
        raise ConfigError(
            f"--num-ranks: found {found!r}, expected the number of ranks on this machine, 1 or more"
        )
    return int(found), rest


def settle(config: Config, num_ranks: int) -> list[str]:
    """The option that update.max_microbatch_tokens auto stands for on this machine, which is printed; none
    where a number was asked for. Raises ConfigError where nothing fits, or nobody knows."""
    if config.update.max_microbatch_tokens != AUTO:
        return []
    device_bytes = free_bytes()
    if device_bytes is None:
        raise ConfigError(
            "update.max_microbatch_tokens: found auto, but nvidia-smi does not say how much memory the GPUs"
            " have free; expected it to work here, or a number"
        )
    from launch.planner.microbatch import settle_auto

    words = settle_auto(config, num_ranks=num_ranks, device_bytes=device_bytes, on_cpu=not has_gpu())
    print(f"update.max_microbatch_tokens auto: {' '.join(words)}", flush=True)
    return words


def check_memory(config: Config, num_ranks: int) -> tuple[str, ...]:
    """What the planner remarks on the ranks in this machine's memory; nothing where they fit, or where
    nobody knows.

    By safety.check_memory a run that does not fit is refused (ConfigError), or warned of on stderr.
    """
    device_bytes = free_bytes()
    if config.safety.check_memory == "off" or device_bytes is None:
        return ()
    # imports torch, which other commands do without
    from launch.planner.memory_check import remarks_on_memory

    remarks = remarks_on_memory(config, num_ranks=num_ranks, device_bytes=device_bytes, on_cpu=not has_gpu())
    if remarks and config.safety.check_memory == "refuse":
        raise ConfigError(f"safety.check_memory: {'; '.join(remarks)}; or set it to warn")
    if remarks:
        print(f"sd-search: warning: {'; '.join(remarks)}", file=sys.stderr, flush=True)
    return remarks


def free_bytes() -> int | None:
    """Of this machine's memory, or of the fullest of its GPUs; None where it cannot be told."""
    if not has_gpu():
        return psutil.virtual_memory().available
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.CalledProcessError):
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        return min(int(mebibytes) << 20 for mebibytes in found)
    return None


def start_ranks(
    num_ranks: int, argv: Sequence[str], remarks: Sequence[str] = (), *, program: str = TRAIN
) -> None:
    """Run a program on `num_ranks` ranks of this machine and wait. Raises MegatronSdError when a rank
    fails, and SystemExit(85) when a run has saved and stopped as it was asked to.

    The cores are shared out among the ranks, unless OMP_NUM_THREADS is set already. Signals are handed on
    to the ranks, which save and stop; they also do when this process is gone.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_ranks))
    choose_accelerator()
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    command = command_line(num_ranks, free_port(), argv, program)
    parent = os.getpid()
    environment[STARTER] = f"{parent} {process_start(parent)}"
    options = {"env": environment, "start_new_session": True, "preexec_fn": lambda: end_with(parent)}
    with subprocess.Popen(command, **options) as process, _handing_on(process.pid):
        code = process.wait()
    if code == STOPPED_EXIT_CODE:
        raise SystemExit(STOPPED_EXIT_CODE)
    if code in _KILLED_CODES:
        raise MegatronSdError(killed_message(num_ranks, remarks))
    if code != 0:
        raise MegatronSdError(f"{program} ended with exit code {code}; the ranks' own message stands above")


def killed_message(num_ranks: int, remarks: Sequence[str]) -> str:
    """What is known when a rank was ended by SIGKILL: it could not say anything itself."""
    expected = f" The planner says: {'; '.join(remarks)}." if remarks else ""
    return (
        f"a rank of {num_ranks} was ended by the system (SIGKILL) without a word, most likely because memory"
        f" ran out: `dmesg` says so.{expected} What was saved stays; the same command goes on with less"
        " memory by model.lora.rank, model.gradient_checkpointing, a smaller update.max_microbatch_tokens or"
        " rollout.max_concurrent_sequences"
    )


def end_with(parent: int) -> None:
    """Ask the system for SIGTERM when the process that started this one is gone, however it ended (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PARENT_DIED, signal.SIGTERM)
    if os.getppid() != parent:  # it has gone already
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _handing_on(pid: int) -> Iterator[None]:
    """Signals of this process become requests to the ranks to save and stop; a second SIGINT or SIGTERM
    ends them at once."""
    heard: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        again = number != signal.SIGUSR1 and number in heard
        heard.append(number)
        if again:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return
        name = signal.Signals(number).name
        print(
            f"sd-search: {name}: the ranks save and stop; {name} again ends them at once",
            file=sys.stderr,
            flush=True,
        )
        ranks = ranks_under(pid)
        if not ranks:  # they have not started: there is nothing to save
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks_under(pid: int) -> list[psutil.Process]:
    """The processes at or below `pid` that are ranks; DeepSpeed's launchers above them end when they have
    ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [process for process in (top, *top.children(recursive=True)) if _is_rank(process)]
    return []


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        words = process.cmdline()
        return not PROGRAMS.isdisjoint(words) and not any(
            word.startswith("deepspeed.launcher") for word in words
        )
    return False


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported anywhere, when this machine has no GPU; or it warns that it had
    to guess."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def command_line(num_ranks: int, port: int, argv: Sequence[str], program: str = TRAIN) -> list[str]:
    """The process to start: python itself for one rank, DeepSpeed's launcher for more."""
    if num_ranks == 1:
        return [sys.executable, "-m", program, *argv]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(num_ranks),
        "--master_port",
        str(port),
    ]
    return [*launcher, "--log_level", "error", "--no_local_rank", "--module", program, *argv]


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
