"""Rollouts on disk, for a run that is started again.

    run_dir/bank/step_00000041.rank_3.1764040000000000000.jsonl     finished ones of the step at work
    run_dir/bank/under_way_00000040.rank_3.jsonl                    what is carried over a checkpoint (carrying.py)

A run that is killed or stopped within a step does not sample finished rollouts again.
The first line names the run and the step, and the version of the weights or the number of ranks; each further
one is a rollout with its checksum. A file that names others is not used, and a torn line ends it. Rollouts
are found by question and place in the group, so that a run which starts again on another number of ranks
finds them, too.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_sd.compact import as_fields
from megatron_sd.durable.files import write_whole
from megatron_sd.records import Rollout
from megatron_sd.rollout.stored import rollout_of

FLUSH_S = 1.0  # between two flushes to disk: a power cut loses so much, a kill nothing

RolloutKey = tuple[str, int]  # question id, place in the group

logger = logging.getLogger(__name__)


class RolloutBank:
    """One rank's handle on the run's bank.

    identity: of the run, so that other settings or another corpus find nothing. only_whole: use what is
    there of a step only when nothing is missing of a rank's part. An engine whose last bits depend on what
    is batched together repeats a step bit for bit only as a whole. keep_steps: of how many checkpoints it keeps
    what they carry; 0: of all.
    """

    def __init__(self, directory: Path, *, rank: int, identity: str, only_whole: bool, keep_steps: int = 0):
        self._directory = directory
        self._rank = rank
        self._identity = identity
        self._only_whole = only_whole
        self._keep_steps = keep_steps

    def carry(self, step: int, records: Iterable[Mapping[str, Any]], *, num_ranks: int) -> None:
        """Write down what is under way of this rank, of so many, before a checkpoint of `step` is made. Raises
        OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        title = {"run": self._identity, "step": step, "num_ranks": num_ranks}
        path = self._directory / f"{_under_way(step)}.rank_{self._rank}.jsonl"
        write_whole(path, "".join(_sealed(json.dumps(record)) for record in (title, *records)))
        self._prune(_under_way(step))

    def _prune(self, newest: str) -> None:
        """Of what is carried keep this one and those of the newest `keep_steps` checkpoints; later ones are of a
        time that the run has gone back from."""
        found = {path.name.partition(".")[0] for path in self._directory.glob("under_way_*.jsonl")}
        earlier = sorted(name for name in found if name <= newest)
        kept = earlier[-self._keep_steps - 1 :] if self._keep_steps else earlier
        for name in found.difference(kept):
            for path in self._directory.glob(f"{name}.*"):
                path.unlink(missing_ok=True)  # another rank may be faster

    def carried(self, step: int, *, num_ranks: int) -> dict[str, dict[str, Any]]:
        """What all of the ranks that made a checkpoint of `step` wrote down, by the rollout's name."""
        title = {"run": self._identity, "step": step, "num_ranks": num_ranks}
        paths = sorted(self._directory.glob(f"{_under_way(step)}.*.jsonl"))
        return {record["name"]: record for path in paths for record in _read(path, title)}

    def open(self, step: int, policy_version: int) -> BankedStep:
        """What is there of a step, sampled from these weights; files of other steps are removed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        prefix = f"step_{step:08d}."
        title = {"run": self._identity, "step": step, "policy_version": policy_version}
        found: dict[RolloutKey, Rollout] = {}
        for path in sorted(self._directory.glob("step_*.jsonl")):
            if path.name.startswith(prefix):
                rollouts = map(rollout_of, _read(path, title))
                found |= {(rollout.question_id, rollout.index): rollout for rollout in rollouts}
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


def _under_way(step: int) -> str:
    return f"under_way_{step:08d}"


def _read(path: Path, title: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a file with this title, up to the first line that is not whole."""
    lines = path.read_bytes().split(b"\n")[:-1]
    texts = [line[9:] for line in lines]
    whole = [line[:8] == b"%08x" % zlib.crc32(text) for line, text in zip(lines, texts)]
    count = whole.index(False) if False in whole else len(whole)
    if count and json.loads(texts[0]) == title:
        yield from map(json.loads, texts[1:count])
