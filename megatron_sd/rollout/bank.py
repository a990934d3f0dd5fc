"""Finished rollouts of the step at work, on disk: a run that is killed or stopped within a step does not
sample them again.

    run_dir/bank/step_00000041.rank_3.1764040000000000000.jsonl

The first line names the run, the step and the version of the weights; each further one is a rollout with
its checksum. A file of another run, step or version is not used, and a torn line ends the file. Rollouts
are found by question and place in the group, so that a run which starts again on another number of ranks
finds them, too.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_sd.compact import as_fields
from megatron_sd.records import Rollout
from megatron_sd.rollout.stored import rollout_of

FLUSH_S = 1.0  # between two flushes to disk: a power cut loses so much, a kill nothing

RolloutKey = tuple[str, int]  # question id, place in the group

logger = logging.getLogger(__name__)


class RolloutBank:
    """One rank's handle on the run's bank.

    identity: of the run, so that other settings or another corpus find nothing. only_whole: use what is
    there of a step only when nothing is missing of a rank's part. An engine whose last bits depend on what
    is batched together repeats a step bit for bit only as a whole.
    """

    def __init__(self, directory: Path, *, rank: int, identity: str, only_whole: bool):
        self._directory = directory
        self._rank = rank
        self._identity = identity
        self._only_whole = only_whole

    def open(self, step: int, policy_version: int) -> BankedStep:
        """What is there of a step, sampled from these weights; files of other steps are removed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        prefix = f"step_{step:08d}."
        title = {"run": self._identity, "step": step, "policy_version": policy_version}
        found: dict[RolloutKey, Rollout] = {}
        for path in sorted(self._directory.glob("step_*.jsonl")):
            if path.name.startswith(prefix):
                found |= {(rollout.question_id, rollout.index): rollout for rollout in _read(path, title)}
            else:
                path.unlink(missing_ok=True)  # another rank may be faster
        path = self._directory / f"{prefix}rank_{self._rank}.{time.time_ns()}.jsonl"
        return BankedStep(found, path, title, only_whole=self._only_whole)


class BankedStep:
    """The rollouts of one step. `ask_for` comes first."""

    def __init__(
        self, found: dict[RolloutKey, Rollout], path: Path, title: dict[str, Any], *, only_whole: bool
    ):
        self._found = found
        self._path = path
        self._title = title
        self._only_whole = only_whole
        self._file: TextIO | None = None
        self._next_flush = 0.0

    def ask_for(self, keys: Collection[RolloutKey]) -> None:
        """The rollouts that this rank needs, before the first of them is looked for."""
        num_found = sum(key in self._found for key in keys)
        if num_found:
            logger.info(
                "%d of %d rollouts of step %d are in the bank", num_found, len(keys), self._title["step"]
            )
        if self._only_whole and num_found < len(keys):
            self._found.clear()

    def find(self, question_id: str, index: int) -> Rollout | None:
        """A rollout that an earlier start of the run finished."""
        return self._found.get((question_id, index))

    def keep(self, rollout: Rollout) -> None:
        """Write a finished rollout down. Raises OSError."""
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
            self._file.write(_sealed(json.dumps(self._title)))
        self._file.write(_sealed(json.dumps(as_fields(rollout))))
        self._file.flush()
        now = time.monotonic()
        if now >= self._next_flush:
            os.fsync(self._file.fileno())
            self._next_flush = now + FLUSH_S

    def close(self) -> None:
        """Nothing more comes."""
        if self._file is not None:
            self._file.close()


def _sealed(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _read(path: Path, title: dict[str, Any]) -> Iterator[Rollout]:
    """The rollouts of a file with this title, up to the first line that is not whole."""
    lines = path.read_bytes().split(b"\n")[:-1]
    texts = [line[9:] for line in lines]
    whole = [line[:8] == b"%08x" % zlib.crc32(text) for line, text in zip(lines, texts)]
    count = whole.index(False) if False in whole else len(whole)
    if count and json.loads(texts[0]) == title:
        yield from (rollout_of(json.loads(text)) for text in texts[1:count])
