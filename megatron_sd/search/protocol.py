"""The text protocol: tags, prompt, how passages are shown, and how a completion is read.

A rollout reads  prompt | <think>..</think> <search>q</search> | <information>passages</information> | ... | <answer>a</answer>
Tags and texts are configuration; a preset fills what the configuration leaves open.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_sd.config import ProtocolConfig, ToolConfig
from megatron_sd.errors import ConfigError
from megatron_sd.own_code.seam import Seam, fault_of_type
from megatron_sd.records import SEARCH, Action
from megatron_sd.search.sanitize import Sanitizer
from megatron_sd.search.tokens import TextCodec, fill

Tags = tuple[str, str]

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


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A complete text protocol: every field of ProtocolConfig, filled, and what belongs to the preset alone.

    note_tags is None where turns begin with the thought. tools: those beside search. information_format:
    what an observation looks like; {passages} are the passages one after the other, without white space
    around them where strips_passages says so. keeps_line_breaks: those within a passage; else they become
    spaces. question_end: put behind a question that does not end in it.
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

    @property
    def action_tags(self) -> dict[str, Tags]:
        """Of search and of every other tool, by name."""
        return {SEARCH: self.search_tags} | {tool.name: tool.own_tags for tool in self.tools}

    @property
    def control_tags(self) -> tuple[str, ...]:
        """Every tag that means something to the environment."""
        return (
            *self.search_tags,
            *self.information_tags,
            *self.answer_tags,
            *self.think_tags,
            *(self.note_tags or ()),
            *(tag for tool in self.tools for tag in tool.own_tags),
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
    protocol = dataclasses.replace(PROTOCOL_SEAM.choose(config.preset)(), **own)
    protocol = dataclasses.replace(
        protocol,
        prompt=_fill_tags("".join(map(_instruction, protocol.tools)) + protocol.prompt, protocol),
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


@dataclass(frozen=True, kw_only=True)
class ParsedCompletion:
    """What a completion does: an action, an answer, or neither. Both texts as sampled, not yet sanitised."""

    action: Action | None = None
    answer: str | None = None


def parse_completion(completion_ids: Sequence[int], protocol: Protocol, codec: TextCodec) -> ParsedCompletion:
    """Read the first complete action or answer of one completion: the first closing tag of a search, another
    tool or an answer that has its opening before it.

    Works on the raw bytes of the ids, so that no id is ever decoded and encoded again; the last opening tag
    before the closing one counts. Bytes that are no UTF-8 read as U+FFFD.

    The straddle rule: a token belongs to the query when all its bytes lie between the last byte of the
    opening tag and the first byte of the closing one. A token that also holds a byte of a tag is excluded,
    and so is every token of the tags themselves.
    """
    offsets = codec.offsets(completion_ids)
    text = codec.bytes_of(completion_ids)
    answer = _first_enclosed(text, protocol.answer_tags)
    calls = ((name, _first_enclosed(text, tags)) for name, tags in protocol.action_tags.items())
    called = [(place, name) for name, place in calls if place is not None]
    if called:
        place, name = min(called, key=lambda call: call[0][1])
        if answer is None or place[1] < answer[1]:
            span = _tokens_inside(offsets, place)
            return ParsedCompletion(action=Action(tool=name, text=_decode(text, place), span=span))
    return ParsedCompletion(answer=None if answer is None else _decode(text, answer))


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
