"""Protocols by name: the texts that a model is shown."""

from __future__ import annotations

import dataclasses
from functools import partial

from megatron_sd.own_code.seam import Seam, fault_of_type
from megatron_sd.records import SEARCH
from megatron_sd.search.native_calls import CALL_TAGS, RESULT_TAGS, native_call
from megatron_sd.search.protocol import QUERY, Protocol, Tags

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
