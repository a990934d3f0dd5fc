"""A vLLM server in a process of its own on this node.

The trainer's process imports no vLLM: its random numbers, process group and threads stay its own. The
server ends when this process does, however it ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.rollout.vllm.server_main import FAILED

POLL_S = 0.25
GRACE_S = 20.0
_CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+)$")


def require_vllm() -> None:
    """Raise ConfigError when vLLM is not installed here."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: found 'vllm', which is not installed here; expected it from `pip install"
            " 'megatron-sd[vllm]'` (`pip install .[vllm]` in a checkout), servers elsewhere"
            " (rollout.vllm.placement server), or rollout.engine torch"
        )


class ServerProcess:
    """Starts at once; `wait_until_ready` before using it. log: where its output goes (the end of it is
    quoted in errors)."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, url: str, log: Path):
        self.url = url
        self._command = [
            sys.executable,
            "-m",
            "megatron_sd.rollout.vllm.server_main",
            "--end-with-stdin",
            *arguments,
        ]
        self._environment = dict(environment)
        self._log = log
        self.start()

    def start(self) -> None:
        """Start it, or start it again after it ended."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the server; its workers are its children."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    def wait_until_ready(self, timeout_s: float) -> None:
        """Raises RolloutError when it ends before it serves, with the cause it printed, or does not serve
        in time."""
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            if not self.is_running:
                raise RolloutError(f"the vLLM server ended before it served: {self.last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RolloutError(
                    f"the vLLM server did not serve within {timeout_s:g} s (rollout.vllm.start_timeout_s);"
                    f" its log is {self._log}"
                )
            time.sleep(POLL_S)

    def last_words(self) -> str:
        """Why it ended, as far as its log says."""
        return f"{cause_of(self._log.read_text(encoding='utf-8', errors='replace'))} (log: {self._log})"

    def end(self) -> None:
        """Tell it to end; `stop` waits for that."""
        self._process.stdin.close()

    def stop(self) -> None:
        """End it and its workers."""
        self.end()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it and its workers at once, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the group it leads
        self._process.wait()

    def answers(self) -> bool:
        """True when it says that it is well."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


def cause_of(log: str) -> str:
    """The most telling line of a server's log: the last error in its engine if there is one, or else its
    own last words.

    >>> cause_of("INFO x\\nERROR ValueError: too small\\nvllm_server failed: RuntimeError: Engine core
    initialization failed.") 'ValueError: too small'
    """
    lines = [line.strip() for line in log.splitlines()]
    own = [line.removeprefix(FAILED) for line in lines if line.startswith(FAILED)]
    if own and "Engine core" not in own[-1]:
        return own[-1]
    causes = [found[1] for line in lines if not line.startswith(FAILED) and (found := _CAUSE.search(line))]
    causes = [cause for cause in causes if "Engine core" not in cause]
    return (causes or own or ["it names no error"])[-1]
