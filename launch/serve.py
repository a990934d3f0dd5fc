"""`sd-search vllm serve`: one vLLM server as a run needs it, on a node of its own (rollout.vllm.placement
server)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from megatron_sd.rollout.vllm.connect import share_of_card
from megatron_sd.rollout.vllm.options import ServedModel, check_server, server_arguments, server_environment
from megatron_sd.rollout.vllm.server_process import require_vllm


def main(argv: Sequence[str]) -> None:
    """Become the server. `--config` and overrides are the run's; --host and --port say where it listens;
    --cpu: without a GPU."""
    command, environment = server_command(argv)
    require_vllm()
    os.execve(sys.executable, command, environment)


def server_command(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server. Raises ConfigError for a run that it could not serve."""
    parser = argparse.ArgumentParser(
        prog="sd-search vllm serve", allow_abbrev=False, add_help=False, exit_on_error=False
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--cpu", action="store_true")
    own, rest = parser.parse_known_args(list(argv))
    if not own.port.isdecimal():
        raise ConfigError(f"--port: found {own.port!r}, expected a number")
    config = load(rest)
    check_server(ServedModel.read(config.model.path), config.model, config.rollout, on_cpu=own.cpu)
    has_gpu = not own.cpu and torch.cuda.is_available()
    share = share_of_card(config.model, config.rollout) if has_gpu else None
    arguments = server_arguments(
        config.model, config.rollout, host=own.host, port=int(own.port), on_cpu=own.cpu, share=share
    )
    environment = server_environment(os.environ, config.rollout, replica=0, on_cpu=own.cpu)
    return [sys.executable, "-m", "megatron_sd.rollout.vllm.server_main", *arguments], environment
