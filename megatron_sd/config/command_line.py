"""From a command line and YAML files to a frozen dataclass of parameters; every mistake is one line that
names the key."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError

Parameters = TypeVar("Parameters")


def parse(record: type[Parameters], argv: Sequence[str], program: str) -> Parameters:
    """A frozen dataclass of parameters from a command line (and `--config FILE.yaml`). Raises ConfigError.

    `--key` alone sets a bool to true.
    """
    argv = [
        f"{word}=true" if is_switch else word
        for word, is_switch in zip(argv, _switches(record, argv), strict=True)
    ]
    for path in _config_files(argv):
        _check_keys(record, _read_mapping(path))
    for word in argv:
        _check_option(record, word)
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False, description=record.__doc__)
    parser.add_argument("--config", action="config", help="YAML file; command-line values override it")
    parser.add_class_arguments(record)
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_explain(str(error), record)) from error
    return record(**{field.name: values[field.name] for field in dataclasses.fields(cast(Any, record))})


def name_positionals(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The leading words of a command line as options, in the order of `names`: for `COMMAND RUN_A RUN_B
    --key value`.

    >>> name_positionals(["runs/a", "--metric", "f1"], ("first", "second"))
    ['--first=runs/a', '--metric', 'f1']
    """
    num_words = next((place for place, word in enumerate(argv) if word.startswith("--")), len(argv))
    named = [f"--{name}={word}" for name, word in zip(names, argv[:num_words])]
    return [*named, *argv[len(named) :]]


def choices_of(record: type) -> dict[str, tuple[str, ...]]:
    """Every key that takes a value, and the names or truth values that it may be chosen from, if it is."""
    found: dict[str, tuple[str, ...]] = {}
    for name in _names(record):
        annotation = _annotation(record, name)
        if section_of(annotation) is not None:
            continue
        is_list = get_origin(annotation) is tuple
        names = literals(get_args(annotation)[0] if is_list else annotation)
        found[name] = ("true", "false") if annotation is bool else tuple(map(str, names))
    return found


def _switches(record: type, argv: Sequence[str]) -> Iterator[bool]:
    """For each word: it names a bool and no value follows."""
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        yield (
            word.startswith("--")
            and following.startswith("--")
            and _annotation(record, word.removeprefix("--")) is bool
        )


def _config_files(argv: Sequence[str]) -> Iterator[Path]:
    for place, word in enumerate(argv):
        if word.startswith("--config="):
            yield Path(word.removeprefix("--config="))
        elif word == "--config":
            if place + 1 == len(argv):
                raise ConfigError("--config: found nothing after it, expected a YAML file")
            yield Path(argv[place + 1])


def _read_mapping(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise ConfigError(
            f"--config: found {'a directory' if path.is_dir() else 'no file'} at {path}, expected a YAML file"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{place} is no YAML: {getattr(error, 'problem', None) or error}; mend the file"
        ) from error
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: found {found}, expected a YAML mapping of keys and values such as `num_steps: 200`"
        )
    return tree


def _check_keys(record: type, tree: Mapping[Any, Any], section: str = "") -> None:
    """Every key is a field (of the section), a section is a mapping, and null stands only where it may;
    other types are for the parser."""
    for key, value in tree.items():
        name = f"{section}{key}"
        annotation = _annotation(record, name)
        if annotation is None:
            raise ConfigError(_unknown(name, record))
        if value is None and type(None) in get_args(annotation):
            continue
        is_section = section_of(annotation) is not None
        if value is None or (is_section and not isinstance(value, dict)):
            raise ConfigError(_mismatch(name, value, annotation))
        if is_section:
            _check_keys(record, value, f"{name}.")


def _check_option(record: type, word: str) -> None:
    """Raise ConfigError for a key that an optional section lacks; the parser would name it without its
    section."""
    name = word.removeprefix("--").partition("=")[0]
    above = _annotation(record, name.rpartition(".")[0]) if word.startswith("--") else None
    is_optional = section_of(above) is not None and type(None) in get_args(above)
    if is_optional and _annotation(record, name) is None:
        raise ConfigError(_unknown(name, record))


def _annotation(record: type, name: str) -> Any:
    """The type of a dotted key, None when there is no such key."""
    annotation: Any = record
    for part in name.split("."):
        section = section_of(annotation)
        annotation = get_type_hints(section).get(part) if section else None
    return annotation


def section_of(annotation: Any) -> Any:
    """The record that a section is, or may be where it may also be null; None for another type."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def _element_of(annotation: Any) -> Any:
    """The record that each item of a list of sections is; None for another type."""
    members = get_args(annotation) if get_origin(annotation) in (tuple, dict) else ()
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def _names(record: type, section: str = "") -> list[str]:
    """All dotted keys, sections included."""
    names = []
    for name, annotation in get_type_hints(record).items():
        names.append(f"{section}{name}")
        if (inner := section_of(annotation)) is not None:
            names += _names(inner, f"{section}{name}.")
    return names


def _unknown(key: str, record: type) -> str:
    """The nearest known key of the same section; a key that another section has; or what the section
    holds."""
    section, _, own = key.rpartition(".")
    known = _names(record)
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    elsewhere = [name for name in known if name.rpartition(".")[2] == own]
    near = [siblings[name] for name in difflib.get_close_matches(own, siblings, n=1)]
    close = near or elsewhere or difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    expected = (
        f"did you mean {close[0]}?"
        if close
        else f"expected one of {', '.join(siblings or get_type_hints(record))}"
    )
    return f"{key}: unknown key; {expected}"


def _mismatch(name: str, value: Any, annotation: Any) -> str:
    found = "nothing" if value == "" else "null" if value in (None, "None") else repr(value)
    return f"{name}: found {found}, expected {describe(annotation)}{_nearest_choice(value, annotation)}"


def _nearest_choice(value: Any, annotation: Any) -> str:
    """Of several names the one that was probably meant."""
    is_list = get_origin(annotation) is tuple
    choices = map(str, literals(get_args(annotation)[0] if is_list else annotation))
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    meant = f"[{near[0]}]" if near and is_list else "".join(near)
    return f"; did you mean {meant}?" if near else ""


def literals(annotation: Any) -> tuple[Any, ...]:
    """The names that a type allows, beside which it may allow a function of the user's own."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(name for member in get_args(annotation) for name in literals(member))
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def describe(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    arguments = get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is OwnFunction:
        return "a function of your own (module:function or file.py:function)"
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    element = _element_of(annotation)
    if element is not None:
        kind = "a list, each" if get_origin(annotation) is tuple else "names, each of"
        return f"{kind} {describe(element)}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join('...' if a is Ellipsis else describe(a) for a in arguments)}]"
    if dataclasses.is_dataclass(annotation):
        return f"a section with {', '.join(get_type_hints(annotation))}"
    return annotation.__name__


def _explain(message: str, record: type) -> str:
    """jsonargparse's message as one line, with the key first, what was found and what was expected."""
    listed = re.search(r'Parser key "([\w.]+)":\s+Problem with given class_path', message)
    element = _element_of(_annotation(record, listed[1])) if listed else None
    if listed and element is not None:
        return f"{listed[1]}: {_explain(message[listed.end() :], element)}"
    missing = re.search(r"arguments are required: (.+)", message)
    if missing:
        sections = re.findall(r'Parser key "([\w.]+)"', message)  # of an optional one
        names = [".".join([*sections, name]) for name in missing[1].split(", ")]
        how = f"set it in the YAML file or as --{names[0]} VALUE"
        return f"missing from the configuration: {', '.join(names)}; {how}"
    unrecognized = re.search(r"unrecognized arguments: (\S+)", message)
    if unrecognized:
        word = unrecognized[1]
        option = re.match(r"--([\w.-]+)", word)
        return (
            _unknown(option[1], record)
            if option
            else f"found {word!r} on the command line, expected --key=value"
        )
    nested = re.search(
        r"Group '([\w.]+)' does not accept option '([\w.]+)'|(?:Key|Option) '([\w.]+)' is not", message
    )
    if nested:
        return _unknown(nested[3] or f"{nested[1]}.{nested[2]}", record)
    keys = re.findall(r'(?:Parser key "|argument --)([\w.]+)', message)  # an optional section, then its key
    key = next((name for name in (".".join(keys), *keys[:1]) if _annotation(record, name) is not None), None)
    if key is not None:
        own = re.search(r"Not of type OwnFunction: (found .*)", message)
        if own and len(literals(_annotation(record, key))) == 0 and "Got value:" not in message:
            return f"{key}: {own[1]}"
        given = re.search(r"(?:Got value:|Given value:|Unable to load config) (.*)", message)
        return _mismatch(key, given[1].strip("'\"") if given else "", _annotation(record, key))
    return re.sub(r"\s*\n\s*", "; ", message.strip())
