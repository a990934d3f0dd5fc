"""Reads a completion: which action or answer it closes first, and where its tokens are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sd.records import Action
from megatron_sd.search.native_calls import UnreadableCallError, read_call
from megatron_sd.search.protocol import Protocol, Tags
from megatron_sd.search.tokens import TextCodec


@dataclass(frozen=True, kw_only=True)
class ParsedCompletion:
    """What a completion does: an action, an answer, or neither. Both texts as sampled, not yet sanitised.
    fault: what is wrong with a native call that asks for nothing, for the model."""

    action: Action | None = None
    answer: str | None = None
    fault: str = ""


def parse_completion(completion_ids: Sequence[int], protocol: Protocol, codec: TextCodec) -> ParsedCompletion:
    """Read the first complete action or answer of one completion: the first closing tag of a search, another
    tool or an answer that has its opening before it.

    Works on the raw bytes of the ids, so that no id is ever decoded and encoded again; the last opening tag
    before the closing one counts. Bytes that are no UTF-8 read as U+FFFD.

    The straddle rule: a token belongs to the query when all its bytes lie between the last byte of the
    opening tag and the first byte of the closing one. A token that also holds a byte of a tag is excluded,
    and so is every token of the tags themselves. A native call's text stands between the quotes of its
    argument, and they are the tags of this rule.
    """
    offsets = codec.offsets(completion_ids)
    text = codec.bytes_of(completion_ids)
    answer = _first_enclosed(text, protocol.answer_tags)
    calls = ((name, _first_enclosed(text, tags)) for name, tags in protocol.action_tags.items())
    called = [(place, name) for name, place in calls if place is not None]
    if called:
        place, name = min(called, key=lambda call: call[0][1])
        if answer is None or place[1] < answer[1]:
            if protocol.native_calls:
                return _parse_native(text, place, offsets, protocol)
            span = _tokens_inside(offsets, place)
            return ParsedCompletion(action=Action(tool=name, text=_decode(text, place), span=span))
    return ParsedCompletion(answer=None if answer is None else _decode(text, answer))


def _parse_native(
    text: bytes, place: tuple[int, int], offsets: Sequence[int], protocol: Protocol
) -> ParsedCompletion:
    try:
        call = read_call(text[place[0] : place[1]], protocol.call_arguments)
    except UnreadableCallError as error:
        return ParsedCompletion(fault=str(error))
    span = _tokens_inside(offsets, (place[0] + call.start, place[0] + call.stop))
    return ParsedCompletion(action=Action(tool=call.tool, text=call.text, span=span))


def _first_enclosed(text: bytes, tags: Tags) -> tuple[int, int] | None:
    """[start, stop) of the bytes before the first closing tag that follows an opening one, from the last
    such opening."""
    opening, closing = (tag.encode("utf-8") for tag in tags)
    first = text.find(opening)
    if first < 0:
        return None
    stop = text.find(closing, first + len(opening))
    return None if stop < 0 else (text.rfind(opening, first, stop) + len(opening), stop)


def _tokens_inside(offsets: Sequence[int], span: tuple[int, int]) -> tuple[int, int]:
    """[start, stop) of the tokens whose bytes all lie within the byte span; offsets: [C + 1] byte offsets."""
    start = bisect_left(offsets, span[0])
    stop = bisect_right(offsets, span[1]) - 1
    return (start, max(start, stop))


def _decode(text: bytes, span: tuple[int, int]) -> str:
    return text[span[0] : span[1]].decode("utf-8", errors="replace")
