"""Calls of functions as Qwen and Hermes models were trained to write them: JSON between tags.

    <tool_call>
    {"name": "search", "arguments": {"query": "mentor of Kalo Miren"}}
    </tool_call>

The model's chat template tells it the functions (`schema`) and shows it what a call returned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CALL_TAGS = ("<tool_call>", "</tool_call>")
RESULT_TAGS = ("<tool_response>", "</tool_response>")

_FORM = '{"name": ..., "arguments": {...}}'
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# ids are bytes: those that are no UTF-8 must keep their number, so that places can be told
_RAW = {"encoding": "utf-8", "errors": "surrogateescape"}


class UnreadableCallError(ValueError):
    """A closed call that asks for nothing; the message is for the model."""


@dataclass(frozen=True, kw_only=True)
class NativeCall:
    """tool: which. text: its one argument, JSON's escapes undone. start, stop: of the bytes between the
    argument's quotes, within the call."""

    tool: str
    text: str
    start: int
    stop: int


def schema(name: str, argument: str, description: str) -> dict[str, Any]:
    """A function of one text, as chat templates take it."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def native_call(name: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """A call, as chat templates take it within a message of the assistant."""
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def read_call(call: bytes, arguments: Mapping[str, str]) -> NativeCall:
    """What stands between the tags. arguments: of every tool, the name of its one argument. Raises
    UnreadableCallError."""
    text = call.decode(**_RAW)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableCallError(f"this call is no JSON, expected {_FORM}") from error
    if not isinstance(found, dict) or not {"name", "arguments"} <= found.keys():
        raise UnreadableCallError(f"this call has no name or no arguments, expected {_FORM}")
    name = found["name"]
    if not isinstance(name, str) or name not in arguments:
        raise UnreadableCallError(f"there is no function {name!r}, expected one of {', '.join(arguments)}")
    given, argument = found["arguments"], arguments[name]
    if not isinstance(given, dict) or given.keys() != {argument} or not isinstance(given[argument], str):
        raise UnreadableCallError(
            f"{name} takes its arguments as {{{json.dumps(argument)}: one text}}, nothing else"
        )
    start, _ = _members(text, _skip(text, 0))["arguments"]
    start, stop = _members(text, start)[argument]
    return NativeCall(
        tool=name,
        text=given[argument],
        start=_num_bytes(text[: start + 1]),
        stop=_num_bytes(text[: stop - 1]),
    )


def _members(text: str, start: int) -> dict[str, tuple[int, int]]:
    """[start, stop) of the values of the JSON object that begins at `start`, which must be a sound one; of
    a key that comes twice the last, as everywhere."""
    places: dict[str, tuple[int, int]] = {}
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)  # behind the colon
        _, stop = _DECODER.raw_decode(text, start)
        places[key] = (start, stop)
        at = _skip(text, stop)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return places


def _skip(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _num_bytes(text: str) -> int:
    return len(text.encode(**_RAW))
