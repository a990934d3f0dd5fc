"""Tools beside search: what a turn may call, and what comes back to the policy.

`protocol.tools` names them. A tool is a function `(text, call) -> str or ToolFailure`, plain or a coroutine
function: a plain one is answered inline, so that rollouts stay a function of their seed; one that waits
should be a coroutine function, and its results are then as repeatable as what it waits for.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_sd.config import ToolConfig
from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError, OwnCodeError, ToolError
from megatron_sd.own_code.loading import load
from megatron_sd.own_code.watching import answer
from megatron_sd.records import Turn

FORM = "tool(text: str, call: ToolCall) -> str or ToolFailure"
MOST_DIGITS = 400  # of a whole number that the calculator makes


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """Who calls: the question, and the rollout's turns so far, the calling one last and without its
    result."""

    question_id: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class ToolFailure:
    """The call cannot be answered, by its own fault: the policy is shown the message, and goes on."""

    message: str


class Pages(Protocol):
    """Where whole documents are."""

    def document(self, passage_id: str) -> str | None:
        """Title and text of the document that a passage is of; None for an unknown id."""
        ...


ToolFunction = Callable[[str, ToolCall], Any]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool of the protocol, ready to be called."""

    config: ToolConfig
    function: ToolFunction

    async def answer(self, text: str, call: ToolCall) -> str:
        """What the policy is shown. Raises ToolError where the function raises or takes too long, unless
        on_error is show; OwnCodeError where it returns something else."""
        who = f"protocol.tools: {self.config.name}"
        try:
            result = await answer(self.function, (text, call), who, self.config.timeout_s)
        except OwnCodeError as error:
            if self.config.on_error == "show":
                return f"{self.config.name} failed."
            raise ToolError(str(error)) from error
        if isinstance(result, ToolFailure):
            return f"{self.config.name}: {result.message}"
        if not isinstance(result, str):
            raise OwnCodeError(f"{who} returned {result!r} ({type(result).__name__}), expected {FORM}")
        return result


def open_tools(configs: Sequence[ToolConfig], pages: Pages | None) -> dict[str, Tool]:
    """By name. pages: of the retriever; None where it has none. Raises ConfigError for a tool that cannot be
    had."""
    return {config.name: Tool(config=config, function=_function(config, pages)) for config in configs}


def _function(config: ToolConfig, pages: Pages | None) -> ToolFunction:
    if isinstance(config.function, OwnFunction):
        return load(config.function, f"protocol.tools: {config.name}", FORM, num_arguments=2)
    return TOOLS[config.function](pages)


def calculate(text: str, _: ToolCall) -> str | ToolFailure:
    """Arithmetic: numbers, + - * / // % **, brackets."""
    try:
        return f"{_value(ast.parse(text.strip().replace('^', '**'), mode='eval').body):.12g}"
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return ToolFailure(message="this is no arithmetic: write numbers, + - * / // % ** and brackets alone")
    except (ZeroDivisionError, OverflowError) as error:
        return ToolFailure(message=str(error))


_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _value(node: ast.AST) -> int | float:
    """Raises ValueError for anything but arithmetic, OverflowError for numbers that are too large."""
    if (
        isinstance(node, ast.Constant)
        and type(node.value) is not bool
        and isinstance(node.value, int | float)
    ):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * len(str(left)) > MOST_DIGITS:
            raise OverflowError("the result is too large")
        result = _OPERATORS[type(node.op)](left, right)
        if isinstance(result, complex):
            raise ValueError("a root of a negative number")
        if isinstance(result, int) and abs(result) >= 10**MOST_DIGITS:
            raise OverflowError("the result is too large")
        return result
    raise ValueError(f"{type(node).__name__} is no arithmetic")


@dataclass(frozen=True)
class OpenPage:
    """The whole document of a passage: by the passage's id, its title as shown, or its number among the
    newest results."""

    pages: Pages

    def __call__(self, text: str, call: ToolCall) -> str | ToolFailure:
        """Title and text, or what the policy may ask for instead."""
        wanted = text.strip().strip('"')
        found = self.pages.document(_passage_id(wanted, call.turns))
        if found is not None:
            return found
        return ToolFailure(message=f"no document {wanted!r}: name a result's number, title or id")


def _passage_id(wanted: str, turns: Sequence[Turn]) -> str:
    newest = next((turn.hits for turn in reversed(turns) if turn.hits), ())
    number = wanted.lower().removeprefix("doc").strip()
    if number.isdecimal() and 0 < int(number) <= len(newest):
        return newest[int(number) - 1].passage.id
    by_title = {hit.passage.title.lower(): hit.passage.id for turn in turns for hit in turn.hits}
    return by_title.get(wanted.lower(), wanted)


def _calculator(_: Pages | None) -> ToolFunction:
    return calculate


def _open_page(pages: Pages | None) -> ToolFunction:
    if pages is None:
        raise ConfigError(
            "protocol.tools: found open_page without retriever.corpus, expected a corpus in this process: servers"
            " hand out passages, not documents"
        )
    return OpenPage(pages)


TOOLS: Mapping[str, Callable[[Pages | None], ToolFunction]] = {
    "calculator": _calculator,
    "open_page": _open_page,
}
