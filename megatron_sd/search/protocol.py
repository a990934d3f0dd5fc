"""The text protocol: tags, prompt, and how passages are shown.

A rollout reads  prompt | <think>..</think> <search>q</search> | <information>passages</information> | ... | <answer>a</answer>
Tags and texts are configuration (protocol_choice.py); a preset fills what the configuration leaves open (presets.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sd.config import ToolConfig
from megatron_sd.records import SEARCH
from megatron_sd.search.chat_template import ChatArguments
from megatron_sd.search.native_calls import schema
from megatron_sd.search.tokens import fill

Tags = tuple[str, str]

QUERY = "query"  # what a native call of search names its argument

SEARCH_DESCRIPTION = (
    "Finds the passages of an encyclopedia that fit a query best. Ask for one fact at a time."
)

_REFLECTION = (
    "\nLook at this answer again. What speaks against it, and what was not looked up? Search further between"
    " {search_open} and {search_close} where that helps, then give the answer that you hold to be right between"
    " {answer_open} and {answer_close}.\n"
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A complete text protocol: every field of ProtocolConfig, filled, and what belongs to the preset alone.

    note_tags is None where turns begin with the thought. tools: those beside search. information_format:
    what an observation looks like; {passages} are the passages one after the other, without white space
    around them where strips_passages says so. keeps_line_breaks: those within a passage; else they become
    spaces. question_end: put behind a question that does not end in it. native_calls: the model calls search
    and tools as its chat template has it (native_calls.py), and what comes back are messages of the chat;
    thoughts stand free before a call or an answer. opening: messages of the chat before the prompt.
    """

    prompt: str
    search_tags: Tags
    information_tags: Tags
    answer_tags: Tags
    think_tags: Tags
    passage_format: str
    invalid_action_message: str
    reflection_message: str = _REFLECTION
    note_tags: Tags | None = None
    tools: tuple[ToolConfig, ...] = ()
    chat_template: bool = False
    template_arguments: Mapping[str, bool | int | str] = dataclasses.field(default_factory=dict)
    information_format: str = "\n{information_open}{passages}{information_close}\n"
    strips_passages: bool = False
    keeps_line_breaks: bool = False
    question_end: str = ""
    native_calls: bool = False
    opening: tuple[Mapping[str, Any], ...] = ()

    @property
    def action_tags(self) -> dict[str, Tags]:
        """Of search and of every other tool, by name; native calls have one pair for all."""
        others = () if self.native_calls else self.tools
        return {SEARCH: self.search_tags} | {tool.name: tool.own_tags for tool in others}

    @property
    def call_arguments(self) -> dict[str, str]:
        """What a native call names its one argument, by tool."""
        return {SEARCH: QUERY} | {tool.name: tool.argument for tool in self.tools}

    @property
    def chat(self) -> ChatArguments | None:
        """What the chat template is given; None where none is used."""
        if not self.chat_template:
            return None
        described = {SEARCH: SEARCH_DESCRIPTION} | {tool.name: tool.description for tool in self.tools}
        schemas = [schema(name, argument, described[name]) for name, argument in self.call_arguments.items()]
        return ChatArguments(
            arguments=self.template_arguments,
            tools=schemas if self.native_calls else (),
            opening=[{**message, "content": fill_tags(message["content"], self)} for message in self.opening],
        )

    @property
    def control_tags(self) -> tuple[str, ...]:
        """Every tag that means something to the environment."""
        actions = (tag for tags in self.action_tags.values() for tag in tags)
        return (
            *actions,
            *self.information_tags,
            *self.answer_tags,
            *self.think_tags,
            *(self.note_tags or ()),
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end a completion: a closed search, another tool's closed call, a closed answer."""
        return (*(closing for _, closing in self.action_tags.values()), self.answer_tags[1])

    def render_prompt(self, question: str, hindsight: str = "") -> str:
        """The prompt of a question; the student's hindsight is empty, the teacher's is its block."""
        return fill(self.prompt, self.prompt_fields(question, hindsight))

    def prompt_fields(self, question: str, hindsight: str) -> dict[str, str]:
        """What the prompt is filled with."""
        if self.question_end:
            question = question.strip().removesuffix(self.question_end) + self.question_end
        return {"hindsight": hindsight, "question": question}


def fill_tags(text: str, protocol: Protocol) -> str:
    """The text with the protocol's tags in the places of {search_open}, {search_close} and so on."""
    for name in ("search", "information", "answer", "think", "note"):
        opening, closing = getattr(protocol, f"{name}_tags") or ("", "")
        text = text.replace(f"{{{name}_open}}", opening).replace(f"{{{name}_close}}", closing)
    return text
