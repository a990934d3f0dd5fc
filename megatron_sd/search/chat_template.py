"""What a tokenizer's chat template writes around the texts of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from megatron_sd.errors import ConfigError
from megatron_sd.search.native_calls import CALL_TAGS, RESULT_TAGS, native_call

Frame = tuple[str, str]  # what stands before a text and after it

_JINJA = jinja2.Environment(extensions=[loopcontrols])  # only to see what a template reads
_OURS = frozenset(
    {"messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize"}
)
# stand for texts while a template is taken apart
_ASKED, _SAID, _SHOWN = "@@megatron-sd-asked@@", "@@megatron-sd-said@@", "@@megatron-sd-shown@@"
_INSTEAD = "set protocol.chat_template to false and write the frame into protocol.prompt"


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    """What a template is given beside the messages. arguments: such as {enable_thinking: False}. tools: the
    functions that a model may call, as JSON schemas (native_calls.py). opening: messages before the prompt."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()
    opening: Sequence[dict[str, Any]] = ()


class ChatTemplate:
    """A tokenizer's template with its arguments. Raises ConfigError where there is none, or where it does not
    read an argument."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, given: ChatArguments):
        if not tokenizer.chat_template and given.tools:
            raise ConfigError(
                "protocol.preset: the tokenizer has no chat template, expected that of a model that was trained to call"
                " functions: choose a protocol.preset with tags of its own"
            )
        if not tokenizer.chat_template:
            raise ConfigError(
                "protocol.chat_template is true but the tokenizer has no chat template; set it to false"
            )
        self._tokenizer = tokenizer
        self._given = given
        _refuse_unread(given, tokenizer.get_chat_template(tools=list(given.tools) or None))

    def prompt_frame(self) -> Frame:
        """Around the prompt, a message of the user; the assistant's opening included. Raises ConfigError for a
        template that does not show the message once."""
        text = self._render([*self._given.opening, {"role": "user", "content": _ASKED}], "a user's message")
        frame = text.split(_ASKED)
        if len(frame) != 2:
            raise ConfigError(
                f"the tokenizer's chat template shows the user's message {len(frame) - 1} times, expected once; "
                + _INSTEAD
            )
        return frame[0], frame[1]

    def message_frame(self) -> Frame:
        """Around a later message of the user, from the end of what the assistant said to its next opening.
        Raises ConfigError for a template that has no such conversation."""
        said = {"role": "assistant", "content": _SAID}
        return self._later_frame(
            [said, {"role": "user", "content": _SHOWN}], _SAID, "a second user's message"
        )

    def result_frame(self) -> Frame:
        """Around what a called function returned, from the end of the call to the assistant's next opening.
        Raises ConfigError for a template that writes calls and results in other tags than CALL_TAGS and
        RESULT_TAGS."""
        said = {"role": "assistant", "content": "", "tool_calls": [native_call("search", {"query": _SAID})]}
        shown = {"role": "tool", "name": "search", "content": _SHOWN}
        before, after = self._later_frame([said, shown], CALL_TAGS[1], "a call of a function and its result")
        if RESULT_TAGS[0] not in before or RESULT_TAGS[1] not in after:
            raise ConfigError(
                f"the tokenizer's chat template shows results as {before!r} ... {after!r}, expected {RESULT_TAGS[0]}"
                f" and {RESULT_TAGS[1]} (Hermes' form): choose a protocol.preset with tags of its own"
            )
        return before, after

    def _later_frame(self, messages: Sequence[dict[str, Any]], last_said: str, of_what: str) -> Frame:
        text = self._render([{"role": "user", "content": _ASKED}, *messages], of_what)
        before, shown, after = text.partition(_SHOWN)
        _, said, before = before.rpartition(last_said)
        if not said or not shown:
            raise ConfigError(
                f"the tokenizer's chat template does not show {of_what} as it was given, expected {last_said}"
                f" before it; {_INSTEAD}"
            )
        return before, after

    def _render(self, messages: Sequence[dict[str, Any]], of_what: str) -> str:
        given: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **self._given.arguments}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=list(self._given.tools) or None, **given
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer's chat template refuses {of_what} with {dict(self._given.arguments)} ({error}); see"
                f" protocol.template_arguments, or {_INSTEAD}"
            ) from error


def _refuse_unread(given: ChatArguments, template: str) -> None:
    """A template passes over what it does not know, so a misspelt argument would do nothing."""
    try:
        read = meta.find_undeclared_variables(_JINJA.parse(template))
    except jinja2.TemplateSyntaxError:  # it uses tags of transformers' own: nobody can tell
        return
    if ours := sorted(given.arguments.keys() & _OURS):
        raise ConfigError(
            f"protocol.template_arguments: found {', '.join(ours)}, which rollouts set themselves; leave"
            " it out"
        )
    if unread := sorted(given.arguments.keys() - read):
        known = ", ".join(sorted(read - _OURS)) or "nothing"
        raise ConfigError(
            f"protocol.template_arguments: the chat template reads no {', '.join(unread)}, expected some of"
            f" what it reads beside the message: {known}"
        )
    if given.tools and "tools" not in read:
        raise ConfigError(
            "protocol.preset: the tokenizer's chat template reads no tools, expected one of a model that was trained"
            " to call functions: choose a protocol.preset with tags of its own"
        )
