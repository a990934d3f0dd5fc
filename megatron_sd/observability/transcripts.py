"""Rollouts for human eyes, and the same as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_sd.compact import as_fields
from megatron_sd.records import SEARCH, Question, Rollout, RolloutGroup, Turn

Decode = Callable[[Sequence[int]], str]

_GUTTER = 9


def render_group(group: RolloutGroup, blocks: Sequence[str], decode: Decode) -> str:
    """One group as text: the question, the prompt, and each rollout's segments by writer, with hits, scores
    and its block.

    blocks: the hindsight text the teacher saw for each rollout, empty where it saw none. Control characters
    are replaced, so that nothing a policy writes can steer a terminal.

        policy   | <search> Kalo Miren guide </search>
        hits     | 1. p17 Kalo Miren (12.31), hop 1
        observed | <information> ...
    """
    question = group.question
    lines = [
        f"question {question.id}: {question.text}",
        f"gold     {' | '.join(question.golden_answers)}",
        *(
            f"hop {number}    any of {', '.join(ids)}"
            for number, ids in enumerate(question.supporting, start=1)
        ),
    ]
    if group.rollouts:
        lines += _segment("prompt", decode(group.rollouts[0].prompt_ids))
    shown = ""
    for rollout, block in zip(group.rollouts, blocks, strict=True):
        lines += ["", _headline(rollout)]
        if block and block == shown:
            lines += _segment("block", "(as above)")
        elif block:
            lines += _segment("block", block)
        shown = block or shown
        for turn in rollout.turns:
            lines += _turn_lines(turn, question, decode)
    return "\n".join(lines) + "\n"


def _headline(rollout: Rollout) -> str:
    parts = [f"rollout {rollout.index}", f"stopped: {rollout.stop_reason}", f"answer: {rollout.answer!r}"]
    figures = rollout.scores.figures if rollout.scores else {}
    parts += [f"{name} {value:.3g}" for name, value in figures.items()]
    return "--- " + " · ".join(parts)


def _turn_lines(turn: Turn, question: Question, decode: Decode) -> list[str]:
    lines = _segment("policy", decode(turn.completion_ids))
    if turn.action is not None and turn.action.tool != SEARCH:
        lines += _segment("calls", f"{turn.action.tool}: {turn.action.text}")
    if turn.query is not None and not turn.hits:
        lines += _segment("hits", "none")
    for rank, hit in enumerate(turn.hits, start=1):
        serves = [str(hop) for hop, ids in enumerate(question.supporting, start=1) if hit.passage.id in ids]
        needed = f", hop {' and '.join(serves)}" if serves else ""
        lines += _segment("hits", f"{rank}. {hit.passage.id} {hit.passage.title} ({hit.score:.2f}){needed}")
    if turn.observation_ids:
        lines += _segment("observed", decode(turn.observation_ids))
    return lines


def _segment(writer: str, text: str) -> list[str]:
    lines = (
        "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in line)
        for line in text.strip("\n").split("\n")
    )
    return [f"{writer:<{_GUTTER - 1}} | {line}".rstrip() for line in lines]


def group_record(group: RolloutGroup, blocks: Sequence[str], decode: Decode) -> dict[str, Any]:
    """One group as JSON-ready data: the records as they are, with the text of every segment beside its ids.

    query, query_span: of a turn that searches, else None. query_parts: the completion's text before, in and
    after its query tokens, where a search has any.
    """
    record = as_fields(group)
    for rollout, fields, block in zip(group.rollouts, record["rollouts"], blocks, strict=True):
        fields["hindsight"] = block
        fields["prompt_text"] = decode(rollout.prompt_ids)
        for turn, own in zip(rollout.turns, fields["turns"], strict=True):
            ids = turn.completion_ids
            own["completion_text"] = decode(ids)
            own["observation_text"] = decode(turn.observation_ids)
            own["query"], own["query_span"] = turn.query, turn.query_span
            if turn.query_span is not None:
                start, stop = turn.query_span
                own["query_parts"] = [decode(ids[:start]), decode(ids[start:stop]), decode(ids[stop:])]
    return record
