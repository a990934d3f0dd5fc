"""The text protocol: tags, prompt, and how passages are shown.

A rollout reads  prompt | <think>..</think> <search>q</search> | <information>passages</information> | ... | <answer>a</answer>
Tags and texts are configuration; a preset fills what the configuration leaves open.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_sd.config import ProtocolConfig, ToolConfig
from megatron_sd.errors import ConfigError
from megatron_sd.own_code.seam import Seam, fault_of_type
from megatron_sd.records import SEARCH
from megatron_sd.search.chat_template import ChatArguments
from megatron_sd.search.native_calls import CALL_TAGS, RESULT_TAGS, native_call, schema
from megatron_sd.search.sanitize import Sanitizer
from megatron_sd.search.tokens import fill

Tags = tuple[str, str]

QUERY = "query"  # what a native call of search names its argument
SEARCH_DESCRIPTION = (
    "Finds the passages of an encyclopedia that fit a query best. Ask for one fact at a time."
)

_INSTRUCTIONS = (
    "Answer the question below. Think between {think_open} and {think_close} each time you learn something"
    " new. If you lack knowledge, search for it with {search_open} query {search_close}; the best passages"
    " come back between {information_open} and {information_close}. Search as often as you need. When you"
    " know enough, give the answer alone between {answer_open} and {answer_close}, for example {answer_open}"
    " Beijing {answer_close}.\n"
)
# What Search-R1's checkpoints were trained on, word for word, its slip ("as your want") included.
_SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside {think_open} and {think_close} first every"
    " time you get new information. After reasoning, if you find you lack some knowledge, you can call a"
    " search engine by {search_open} query {search_close} and it will return the top searched results between"
    " {information_open} and {information_close}. You can search as many times as your want. If you find no"
    " further external knowledge needed, you can directly provide the answer inside {answer_open} and"
    " {answer_close}, without detailed illustrations. For example, {answer_open} Beijing {answer_close}."
    " Question: {question}\n"
)
_SEARCH_R1_RETRY = (
    "\nMy previous action is invalid. If I want to search, I should put the query between {search_open} and"
    " {search_close}. If I want to give the final answer, I should put the answer between {answer_open} and"
    " {answer_close}. Let me try again.\n"
)
_RETRY = (
    "\nThat was neither a search nor an answer. To search, write the query between {search_open} and"
    " {search_close}; to answer, write the answer between {answer_open} and {answer_close}.\n"
)
_REFLECTION = (
    "\nLook at this answer again. What speaks against it, and what was not looked up? Search further between"
    " {search_open} and {search_close} where that helps, then give the answer that you hold to be right between"
    " {answer_open} and {answer_close}.\n"
)
# For models that were not trained to search: the form, then one worked example of two searches, as the
# environment shows them.
_FEW_SHOT_PROMPT = (
    "Answer the question at the end by searching. Each time, think between {think_open} and {think_close}"
    " first. Then write either one search, {search_open} query {search_close}, or the answer, {answer_open}"
    " answer {answer_close}, nothing else. What a search finds is shown to you between {information_open} and"
    " {information_close}; never write that yourself. Ask for one fact at a time, and keep the answer to a"
    " few words.\n\nExample\nQuestion: Which river flows through the town where the painter of The Harbour"
    " Wall was born?\n{think_open} I need the painter and the town first. {think_close}\n{search_open}"
    ' painter of The Harbour Wall birthplace {search_close}\n\n{information_open}Doc 1(Title: "The Harbour'
    ' Wall") The Harbour Wall is a painting of 1871 by Ida Kerrow, who was born in'
    " Dunmere.{information_close}\n\n{think_open} Ida Kerrow was born in Dunmere. Now its river."
    " {think_close}\n{search_open} river through Dunmere {search_close}\n\n{information_open}Doc 1(Title:"
    ' "Dunmere") Dunmere is a market town on the river Asel.{information_close}\n\n{think_open} The river is'
    " the Asel. {think_close}\n{answer_open} Asel {answer_close}\n\n"
)
_NATIVE_RETRY = (
    "That was neither a call of a function nor an answer. Call search, or write the answer between {answer_open}"
    " and {answer_close}."
)
_NATIVE_REFLECTION = (
    "Look at this answer again. What speaks against it, and what was not looked up? Call search again where that"
    " helps, then write the answer that you hold to be right between {answer_open} and {answer_close}."
)
_NATIVE_RULES = (
    "Answer each question. Look up what it needs with the search function: one call a message, one fact a call, and"
    " before it a sentence about what you know and what you need. When you know enough, write the answer alone, in a"
    " few words, between {answer_open} and {answer_close}.\n"
)
# One question as the chat goes; the model's template writes the call.
_NATIVE_EXAMPLE = (
    {
        "role": "user",
        "content": _NATIVE_RULES + "Question: In which town was the painter of The Harbour Wall born?",
    },
    {
        "role": "assistant",
        "content": "I need the painter, and the town.",
        "tool_calls": [native_call(SEARCH, {QUERY: "painter of The Harbour Wall birthplace"})],
    },
    {
        "role": "tool",
        "content": 'Doc 1(Title: "The Harbour Wall") The Harbour Wall is a painting of 1871 by Ida Kerrow, who was'
        " born in Dunmere.",
    },
    {
        "role": "assistant",
        "content": "It is by Ida Kerrow, who was born in Dunmere.\n{answer_open} Dunmere {answer_close}",
    },
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
            opening=[
                {**message, "content": _fill_tags(message["content"], self)} for message in self.opening
            ],
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


def _tag(name: str) -> Tags:
    return (f"<{name}>", f"</{name}>")


_SEARCH_R1 = Protocol(
    prompt="{hindsight}" + _SEARCH_R1_PROMPT,
    search_tags=_tag("search"),
    information_tags=_tag("information"),
    answer_tags=_tag("answer"),
    think_tags=_tag("think"),
    passage_format='Doc {rank}(Title: "{title}") {text}\n',
    invalid_action_message=_SEARCH_R1_RETRY,
    information_format="\n\n{information_open}{passages}{information_close}\n\n",
    strips_passages=True,
    keeps_line_breaks=True,
    question_end="?",
)

PRESETS: dict[str, Protocol] = {
    "search_r1": _SEARCH_R1,
    "few_shot": dataclasses.replace(
        _SEARCH_R1,
        prompt=_FEW_SHOT_PROMPT + "{hindsight}Question: {question}\n",
        invalid_action_message=_RETRY,
        question_end="",
    ),
    "autorefine": Protocol(
        prompt=_INSTRUCTIONS
        + "After each result, note what matters between {note_open} and {note_close}.\n{hindsight}Question:"
        " {question}\n",
        search_tags=_tag("search"),
        information_tags=_tag("documents"),
        answer_tags=_tag("answer"),
        think_tags=_tag("think"),
        note_tags=_tag("refine"),
        passage_format="Doc {rank}(Title: {title}) {text}\n",
        invalid_action_message=_RETRY,
    ),
    # For models that were trained to call functions in Hermes' form, as Qwen2.5, through their chat template.
    "qwen_tools": Protocol(
        prompt="{hindsight}Question: {question}",
        opening=_NATIVE_EXAMPLE,
        search_tags=CALL_TAGS,
        information_tags=RESULT_TAGS,
        answer_tags=_tag("answer"),
        think_tags=_tag("think"),
        passage_format='Doc {rank}(Title: "{title}") {text}\n',
        invalid_action_message=_NATIVE_RETRY,
        reflection_message=_NATIVE_REFLECTION,
        strips_passages=True,
        keeps_line_breaks=True,
        chat_template=True,
        native_calls=True,
    ),
    # Few tokens for small models trained from scratch (the synthetic world): no instructions, one line a
    # passage.
    "compact": Protocol(
        prompt="{hindsight}Question: {question}\n",
        search_tags=_tag("search"),
        information_tags=_tag("information"),
        answer_tags=_tag("answer"),
        think_tags=_tag("think"),
        passage_format=" {text}\n",
        invalid_action_message="",
    ),
}


PROTOCOL_SEAM = Seam(
    key="protocol.preset",
    form="protocol() -> Protocol",
    table={name: partial(PRESETS.__getitem__, name) for name in PRESETS},
    example=tuple,
    fault=lambda protocol, *_: fault_of_type(protocol, Protocol),
)
_FIELDS = frozenset(field.name for field in dataclasses.fields(Protocol))


def _fill_tags(text: str, protocol: Protocol) -> str:
    for name in ("search", "information", "answer", "think", "note"):
        opening, closing = getattr(protocol, f"{name}_tags") or ("", "")
        text = text.replace(f"{{{name}_open}}", opening).replace(f"{{{name}_close}}", closing)
    return text


def build_protocol(config: ProtocolConfig) -> Protocol:
    """The preset with the configuration's own fields in place. Raises ConfigError for tags or prompts that
    cannot work."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in _FIELDS}
    own = {name: value for name, value in own.items() if value is not None}
    preset = PROTOCOL_SEAM.choose(config.preset)()
    own["chat_template"] = config.chat_template or preset.chat_template
    protocol = dataclasses.replace(preset, **own)
    _refuse_own_tags(protocol, preset)
    instructions = "" if protocol.native_calls else "".join(map(_instruction, protocol.tools))
    protocol = dataclasses.replace(
        protocol,
        prompt=_fill_tags(instructions + protocol.prompt, protocol),
        invalid_action_message=_fill_tags(protocol.invalid_action_message, protocol),
        reflection_message=_fill_tags(protocol.reflection_message, protocol),
        information_format=_fill_tags(protocol.information_format, protocol),
    )
    for placeholder in ("{question}", "{hindsight}"):
        if protocol.prompt.count(placeholder) != 1:
            raise ConfigError(
                f"protocol.prompt holds {placeholder} {protocol.prompt.count(placeholder)} times, expected"
                " exactly once: the hindsight block and the question each need one place"
            )
    _refuse_tools(protocol)
    _refuse_unread_tags(protocol)
    if protocol.template_arguments and not protocol.chat_template:
        raise ConfigError(
            f"protocol.template_arguments: found {protocol.template_arguments} without a chat template,"
            " expected protocol.chat_template true"
        )
    tags = protocol.control_tags
    if len(set(tags)) != len(tags) or not all(tags):
        raise ConfigError(f"protocol tags must be non-empty and distinct, found {tags}")
    return protocol


def _instruction(tool: ToolConfig) -> str:
    """What the prompt says of a tool."""
    if not tool.description:
        return ""
    opening, closing = tool.own_tags
    return (
        f"{tool.description.strip()} To do so write {opening} what you ask {closing}; the result comes back between"
        " {information_open} and {information_close}.\n"
    )


def _refuse_own_tags(protocol: Protocol, preset: Protocol) -> None:
    """Raise ConfigError for tags beside those that native calls have."""
    if not protocol.native_calls:
        return
    for name in ("search_tags", "information_tags"):
        if (found := getattr(protocol, name)) != (expected := getattr(preset, name)):
            raise ConfigError(
                f"protocol.{name}: found {found}, expected none beside a preset of native calls: the chat template"
                f" has {' '.join(expected)}"
            )
    if tagged := [tool.name for tool in protocol.tools if tool.tags is not None]:
        raise ConfigError(
            f"protocol.tools: found tags for {', '.join(tagged)}, expected none beside a preset of native calls: the"
            " chat template has its own (`argument` names what a call gives)"
        )


def _refuse_tools(protocol: Protocol) -> None:
    """Raise ConfigError for tools that cannot be told apart."""
    names = [SEARCH, *(tool.name for tool in protocol.tools)]
    for tool in protocol.tools:
        if not tool.name.isidentifier() or names.count(tool.name) > 1:
            raise ConfigError(
                f"protocol.tools: found the name {tool.name!r}, expected one of letters, digits and _ that no other"
                f" tool has (search is one): {', '.join(names)}"
            )
        if not (tool.timeout_s > 0 and (tool.max_calls is None or tool.max_calls > 0)):
            raise ConfigError(
                f"protocol.tools: {tool.name}: found timeout_s {tool.timeout_s} and max_calls {tool.max_calls},"
                " expected more than 0 of each"
            )
    tags = protocol.control_tags if protocol.tools else ()
    for tag in tags:
        others = [other for other in tags if other is not tag and tag in other]
        if others:
            raise ConfigError(
                f"protocol.tools: found the tags {tag} and {others[0]}, expected tags of which none is part of"
                " another: nobody could say which one was written"
            )


def _refuse_unread_tags(protocol: Protocol) -> None:
    """Raise ConfigError for a tag in the prompt that is spelled in another way than the environment reads
    it (`< Search >`), or hidden by invisible characters: a model would copy it from the example, and its
    action would be none."""
    sanitizer, plain = Sanitizer(protocol.control_tags), Sanitizer(())
    exact = re.compile("|".join(map(re.escape, sorted(protocol.control_tags, key=len, reverse=True))))
    for line in exact.sub("\n", protocol.prompt).split("\n"):
        if sanitizer.clean(line) != plain.clean(line):
            tags = " ".join(protocol.control_tags)
            raise ConfigError(
                f"protocol.prompt: found a tag in {line.strip()!r} that is written otherwise than the"
                f" environment reads it; expected exactly {tags}, or {{search_open}}, {{search_close}} and so"
                " on in their places"
            )
