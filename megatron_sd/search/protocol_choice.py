"""The protocol that a configuration asks for: a preset with fields of its own, or what cannot work about it."""

from __future__ import annotations

import dataclasses
import re

from megatron_sd.config import ProtocolConfig, ToolConfig
from megatron_sd.errors import ConfigError
from megatron_sd.records import SEARCH
from megatron_sd.search.presets import PROTOCOL_SEAM
from megatron_sd.search.protocol import Protocol, fill_tags
from megatron_sd.search.sanitize import Sanitizer

_FIELDS = frozenset(field.name for field in dataclasses.fields(Protocol))


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
        prompt=fill_tags(instructions + protocol.prompt, protocol),
        invalid_action_message=fill_tags(protocol.invalid_action_message, protocol),
        reflection_message=fill_tags(protocol.reflection_message, protocol),
        information_format=fill_tags(protocol.information_format, protocol),
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
