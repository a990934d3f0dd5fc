"""The reference: Markdown pages of every key of every program, written from the records of parameters.

What a key means is the comment beside it in its record, or `name: ...` in the record's docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

import yaml

from launch.cli import COMMANDS
from launch.shell.completion import OPTIONS
from megatron_sd.config import Config
from megatron_sd.config.command_line import describe, section_of
from megatron_sd.config.load import plain

RUN_PAGE, PROGRAMS_PAGE = "reference/run.md", "reference/programs.md"
EXTRA = {  # options that are in no record
    "--num-ranks": "processes on this machine that share the work; 1 unless it is given",
    "--as": "a method by name: its file of `launch/configs/as` is read after the files of `--config`",
    "--list": "print the methods that `--as` knows, and end",
    "--recipe": "a run and its layout by name, of `launch/configs`",
    "--layout": "a YAML file of the layout's options",
    "--dry-run": "as `dry_run`",
    "--this-machine": "as `this_machine`",
    "--host": "the address to listen on; 127.0.0.1 unless it is given",
    "--port": "the port to listen on; 8000 unless it is given",
    "--cpu": "without a GPU",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key as a row of a table. default: as YAML has it; None: it must be given."""

    name: str
    type: str
    default: str | None
    meaning: str
    section: type | None


def pages() -> dict[str, str]:
    """Every page of the reference by its path within the site."""
    return {RUN_PAGE: run_page(), PROGRAMS_PAGE: programs_page()}


def run_page() -> str:
    """All sections of a training run."""
    parts = [
        "# The configuration of a run",
        "Every key of `sd-search train`, as `--section.key value` or in the YAML file of `--config`. Which of"
        " them decide what is trained: [configuration](../configuration.md).",
        *_sections(Config, "", shared={}),
    ]
    return "\n\n".join(parts) + "\n"


def programs_page() -> str:
    """All other commands."""
    shared = run_sections()
    parts = [
        "# Programs",
        "Every command of `sd-search` and its keys, as `--key value` or in the YAML file of `--config`."
        " Sections that a training run has, too, stand on the page of [its configuration](run.md).",
    ]
    for name, command in COMMANDS.items():
        place = name.replace(" ", "-")
        parts += [f"## {name} {{ #{place} }}", f"{_escaped(command.help)}"]
        for own in OPTIONS[name]:
            if not own.startswith("--"):
                record = record_of(own)
                if record is Config:
                    parts.append("It takes the keys of [a run](run.md).")
                else:
                    parts += _sections(record, "", shared=shared, place=f"{place}.")
        extra = [own for own in OPTIONS[name] if own.startswith("--")]
        if extra:
            rows = [f"| `{option}` | {EXTRA[option]} |" for option in extra]
            parts.append("\n".join(["| option | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def record_of(entry: str) -> type:
    """The record that `module:class` names."""
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)


def run_sections() -> dict[type, str]:
    """Every section of a run, and its first dotted name."""
    found: dict[type, str] = {}
    for name, record in _walk(Config, ""):
        found.setdefault(record, name)
    return found


def keys_of(record: type) -> list[Key]:
    """The keys of one record, sections among them, in order."""
    hints, comments = get_type_hints(record), comments_of(record)
    described = inspect.cleandoc(record.__doc__ or "")
    found = []
    for field in dataclasses.fields(record):
        annotation = hints[field.name]
        section = section_of(annotation)
        meaning = comments.get(field.name) or _sentence(described, field.name)
        found.append(
            Key(
                name=field.name,
                type="a section" if section else describe(annotation),
                default=_default(field, section),
                meaning=meaning,
                section=section,
            )
        )
    return found


def comments_of(record: type) -> dict[str, str]:
    """The comments beside and right above each field of a record, those of the records that it extends
    included."""
    found: dict[str, str] = {}
    for cls in reversed(record.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        comments = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.string.startswith("# noqa")
        }
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign):
                found[ast.unparse(node.target)] = _comment(node, comments)
    return found


def _comment(node: ast.AnnAssign, comments: Mapping[int, tuple[str, bool]]) -> str:
    above: list[str] = []
    line = node.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    beside = [comments[line][0] for line in lines if line in comments]
    return " ".join([*above, *beside])


def _sentence(docstring: str, name: str) -> str:
    """What `name: ...` or `name, other: ...` says in a docstring."""
    text = re.sub(r"\s+", " ", docstring)
    match = re.search(rf"(?:^|[.;] )`?(?:\w+, )*{name}`?(?:, \w+)*: (.+?)(?:[.;](?: |$)|$)", text)
    return match[1] if match else ""


def _default(field: dataclasses.Field[Any], section: type | None) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is dataclasses.MISSING:
        return None
    made = field.default_factory()
    if section is None:
        return _yaml(made)
    usual = {own.name: own.default for own in dataclasses.fields(section)}
    other = {
        name: value
        for name, default in usual.items()
        if default is not dataclasses.MISSING
        and (value := getattr(made, name)) != default
        and name != "dtype"
    }
    return _yaml(other) if other else ""


def _yaml(value: Any) -> str:
    """On one line."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _walk(record: type, name: str) -> Iterator[tuple[str, type]]:
    yield name, record
    for key in keys_of(record):
        if key.section is not None:
            yield from _walk(key.section, f"{name}.{key.name}".lstrip("."))


def _sections(record: type, name: str, *, shared: Mapping[type, str], place: str = "") -> Iterator[str]:
    """A heading, the docstring and a table; then the same of each section that stands on no other page.
    place: what anchors begin with."""
    keys = keys_of(record)
    if name:
        yield f"{'###' if place else '##'} {name} {{ #{place}{name} }}"
    yield _escaped(re.sub(r"\s+", " ", inspect.cleandoc(record.__doc__ or "")))
    dotted = [f"{name}.{key.name}".lstrip(".") for key in keys]
    rows = [_row(key, own, shared=shared, place=place) for key, own in zip(keys, dotted, strict=True)]
    yield "\n".join(["| key | type | default | what it is |", "|---|---|---|---|", *rows])
    for key, own in zip(keys, dotted, strict=True):
        if key.section is not None and key.section not in shared:
            yield from _sections(key.section, own, shared=shared, place=place)


def _row(key: Key, dotted: str, *, shared: Mapping[type, str], place: str) -> str:
    default = "must be given" if key.default is None else f"`{_cell(key.default)}`" if key.default else ""
    name, kind, meaning = f'<code id="{place}{dotted}">{key.name}</code>', _escaped(key.type), key.meaning
    if key.section is not None:
        name = f"`{key.name}`"
        target = f"run.md#{shared[key.section]}" if key.section in shared else f"#{place}{dotted}"
        kind = f"[section]({target})"
        meaning = meaning or _first_sentence(key.section)
    return f"| {name} | {_cell(kind)} | {default} | {_cell(_escaped(meaning))} |"


def _first_sentence(record: type) -> str:
    text = re.sub(r"\s+", " ", inspect.cleandoc(record.__doc__ or ""))
    return re.split(r"(?<=\.) ", text)[0].rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text of a comment as Markdown that reads the same; code between backquotes stays."""
    parts = text.split("`")
    return "`".join(
        part if place % 2 else re.sub(r"([*_\[\]<>])", r"\\\1", part) for place, part in enumerate(parts)
    )
