"""`sd-search watch RUN_DIR`: a run as a page that follows it while it trains, on this machine alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.watch.server import listen
from eval.watch.view import View, check_is_run
from megatron_sd.config.command_line import name_positionals, parse


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Serve a page on 127.0.0.1 that follows the training run in `run_dir`: curves, phase times, what its
    ranks do, and the newest groups of rollouts. It only reads; Ctrl-C ends it."""

    run_dir: str  # of a run that trains, has trained, or is about to
    port: int = 8765  # of 127.0.0.1; 0: any free one


def main(argv: Sequence[str]) -> None:
    """The command line of `watch`. Serves until KeyboardInterrupt, which it hands on. Raises DataError for
    what is no run, ConfigError for a port that cannot be had."""
    config = parse(WatchConfig, name_positionals(argv, ("run_dir",)), "sd-search watch")
    check_is_run(Path(config.run_dir))
    with listen(View(Path(config.run_dir)), config.port) as server:
        print(f"watching {config.run_dir} at {server.address} (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("no longer watching; the run is as it was", flush=True)
            raise
