"""The process of one vLLM server: vLLM's own OpenAI-compatible server, ended when its parent ends.

    python -m megatron_sd.rollout.vllm.server_main ARGUMENTS...     (options.server_arguments; the environment from there, too)

Whatever ends it early is said in one line that starts with FAILED, the last of its output.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

FAILED = "vllm_server failed: "
GRACE_S = 10.0


def main(argv: Sequence[str]) -> int:
    """Serve until the parent closes our stdin, or goes away, or a signal ends us."""
    # the ranks' word to save and stop; SLURM gives it to every process of a step
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if "--end-with-stdin" in argv:
        argv = [argument for argument in argv if argument != "--end-with-stdin"]
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        serve(argv)
    except Exception as error:  # the boundary of a process: the parent reads the line
        print(f"{FAILED}{_root(error)}", flush=True)
        return 1
    return 0


def serve(argv: Sequence[str]) -> None:
    """vLLM's server over the given vLLM arguments."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(list(argv))
    validate_parsed_serve_args(arguments)
    check_head_dim(arguments.model)
    uvloop.run(run_server(arguments))


def check_head_dim(path: str) -> None:
    """Raise ValueError for a head size that vLLM's CPU attention lacks: it would fail in the first forward
    only."""
    from vllm.platforms import current_platform

    from megatron_sd.rollout.vllm.options import ServedModel

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    found, served = ServedModel.read(path).head_dim, CPUAttentionBackend.get_supported_head_sizes()
    if found not in served:
        raise ValueError(
            f"{path} has attention heads of {found}, expected one of {served} on a CPU; use rollout.engine"
            " torch"
        )


def _end_with_stdin() -> None:
    """The parent holds the other end of stdin: end of file means that it is gone, however it went."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _root(error: BaseException) -> str:
    """The first cause of an error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
