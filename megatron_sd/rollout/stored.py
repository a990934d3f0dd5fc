"""Rollouts as JSON lines: a line a question, with the question, its rollouts whole and what they earned.

    {"question": {"id": .., "text": .., "golden_answers": [..], ..}, "rollouts": [{"prompt_ids": [..],
    "turns": [..], ..}, ..]}

Ids stay ids: what was sampled is never decoded and encoded again. `sd-search sample` writes such lines,
`sd-search select` reads and writes them, `sd-search sft` trains on them; the gate's draws and the bank hold
the same rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_sd.compact import as_fields
from megatron_sd.errors import DataError
from megatron_sd.records import (
    SEARCH,
    Action,
    Hit,
    Passage,
    Question,
    Rollout,
    RolloutGroup,
    Scores,
    StopReason,
    Turn,
)

ROLLOUTS_NAME = "rollouts.jsonl"
SAMPLE_NAME = "report.json"  # of a finished sample
EPISODES_NAME = "episodes.json"  # of a finished selection
TRAIN_NAME = "train.jsonl"
VALIDATION_NAME = "validation.jsonl"


class StoredGroups(Sequence[RolloutGroup]):
    """The groups of a file, which stay on disk until they are asked for. Half a line at the end, which a
    kill left, is left out.

    Raises DataError for a file that is not there, and for a line that is no group, when it is read.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; expected rollouts that `sd-search sample` or `sd-search select`"
                " wrote"
            )
        self._path = path
        with path.open("rb") as file:
            lengths = [len(line) for line in file if line.endswith(b"\n")]
        self._starts = list(accumulate(lengths, initial=0))[:-1]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> RolloutGroup:  # type: ignore[override]
        with self._path.open("rb") as file:
            file.seek(self._starts[place])
            line = file.readline()
        return group_of(line, f"{self._path}:{place % len(self._starts) + 1}")

    def __iter__(self) -> Iterator[RolloutGroup]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number <= len(self._starts):
                    yield group_of(line, f"{self._path}:{number}")


def read_record(path: Path, written_by: str) -> dict[str, Any]:
    """What a directory of rollouts or episodes says of itself. Raises DataError when there is none, or its
    file is broken."""
    if not path.is_file():
        raise DataError(
            f"{path.parent} holds no {path.name}, expected a directory that `{written_by}` finished"
        )
    try:
        return {"strategy": None, **json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no JSON object ({error}); run `{written_by}` into another directory"
        ) from error


def check_tokenizer(fingerprint: str, record: Mapping[str, Any], place: Path) -> None:
    """Raise DataError when another tokenizer than this one made the ids. record: of read_record."""
    if (found := record.get("tokenizer")) != fingerprint:
        raise DataError(
            f"{place} holds ids of another tokenizer: {found} (of {record.get('model')}), expected"
            f" {fingerprint}: the same ids mean other text; use the model that sampled, or one with its"
            " tokenizer, or sample with this one"
        )


def fields_of(group: RolloutGroup) -> dict[str, Any]:
    """The JSON object of a line."""
    return as_fields(group)


def group_of(line: bytes, place: str) -> RolloutGroup:
    """The RolloutGroup of a line, equal to the one that was written. Raises DataError naming the place."""
    try:
        fields = json.loads(line)
        asked = fields["question"]
        question = Question(
            **{
                **asked,
                "golden_answers": tuple(asked["golden_answers"]),
                "supporting": tuple(map(tuple, asked["supporting"])),
            }
        )
        return RolloutGroup(question=question, rollouts=tuple(map(rollout_of, fields["rollouts"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{place} is no question with rollouts ({type(error).__name__}: {error}); expected a line that"
            " `sd-search sample` or `sd-search select` wrote: the file was changed, or is of another kind"
        ) from error


def rollout_of(fields: dict[str, Any]) -> Rollout:
    """The Rollout whose asdict() went through JSON; equal to it."""
    scores = fields.get("scores")
    return Rollout(
        question_id=fields["question_id"],
        index=fields["index"],
        prompt_ids=tuple(fields["prompt_ids"]),
        turns=tuple(turn_of(turn) for turn in fields["turns"]),
        stop_reason=StopReason(fields["stop_reason"]),
        answer=fields["answer"],
        scores=None if scores is None else _scores_of(scores),
    )


def _scores_of(fields: dict[str, Any]) -> Scores:
    return Scores(**fields | {"em_by_attempt": tuple(fields.get("em_by_attempt", ()))})


def turn_of(fields: dict[str, Any]) -> Turn:
    """The Turn whose as_fields() went through JSON; equal to it."""
    hits = tuple(Hit(passage=Passage(**hit["passage"]), score=hit["score"]) for hit in fields["hits"])
    tuples = {
        name: tuple(fields[name]) for name in ("completion_ids", "completion_logprobs", "observation_ids")
    }
    own = {"policy_version": fields["policy_version"], "well_formed": fields["well_formed"]}
    newer = {name: fields[name] for name in ("note", "attempt", "answer") if name in fields}
    return Turn(**own, **tuples, hits=hits, action=_action_of(fields), **newer)


def _action_of(fields: dict[str, Any]) -> Action | None:
    """Files from before there were tools have a search's `query` and `query_span`."""
    action = fields.get("action")
    if action is None and fields.get("query") is not None:
        action = {"tool": SEARCH, "text": fields["query"], "span": fields["query_span"]}
    if action is None:
        return None
    span = action["span"]
    return Action(tool=action["tool"], text=action["text"], span=None if span is None else tuple(span))
