"""Whether what the policy wrote has the form that the protocol asks for."""

from __future__ import annotations

from megatron_sd.records import Rollout, StopReason
from megatron_sd.search.native_calls import UnreadableCallError, read_call
from megatron_sd.search.protocol import Protocol


def completion_is_well_formed(text: str, protocol: Protocol) -> bool:
    """True for: at most one note span (where the protocol has them), at most one think span, then exactly
    one span of a search, another tool or an answer, white space around them, nothing else.

    `text` is one decoded completion without the end-of-sequence token. No control tag may occur inside a
    span. Beside native calls thoughts stand free before the call, which must be a readable one, or the
    answer.
    """
    body = text.strip()
    for opening, closing in filter(None, (protocol.note_tags, protocol.think_tags)):
        if body.startswith(opening):
            thought, closed, body = body.removeprefix(opening).partition(closing)
            if not closed or _holds_tag(thought, protocol):
                return False
            body = body.strip()
    acts = (*protocol.action_tags.values(), protocol.answer_tags)
    if protocol.native_calls:
        begins = min((body.find(opening) for opening, _ in acts if opening in body), default=0)
        if _holds_tag(body[:begins], protocol):
            return False
        body = body[begins:]
    for opening, closing in acts:
        if body.startswith(opening) and body.endswith(closing):
            content = body[len(opening) : -len(closing)]
            is_sound = bool(content.strip()) and not _holds_tag(content, protocol)
            is_call = protocol.native_calls and opening != protocol.answer_tags[0]
            return is_sound and (not is_call or _is_readable(content, protocol))
    return False


def _is_readable(call: str, protocol: Protocol) -> bool:
    try:
        return bool(read_call(call.encode(), protocol.call_arguments).text.strip())
    except UnreadableCallError:
        return False


def _holds_tag(text: str, protocol: Protocol) -> bool:
    return any(tag in text for tag in protocol.control_tags)


def format_valid(rollout: Rollout) -> float:
    """1.0 when every turn is well-formed, and in every attempt all but the last act, and the last one answers;
    else 0.0."""
    if rollout.stop_reason is not StopReason.ANSWERED or not rollout.answer or not rollout.turns:
        return 0.0
    in_order = all(
        all(turn.action is not None for turn in before) and last.action is None
        for *before, last in rollout.attempts
    )
    return float(in_order and all(turn.well_formed for turn in rollout.turns))
