"""Gold answers as public files hold them: strings, lists, and lists that were written as text."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from data_prep.sources.jsonl import RowError

_UNKNOWN = "<unk>"  # what the hub's TriviaQA says where answers are not published
_NUMPY = re.compile(r"""^\[\s*(['"]).*\1\s+['"].*\]$""", re.DOTALL)  # strings without a comma between them


class UnanswerableError(RowError):
    """A question that has no answer by its publisher's design: left out and counted, but not a broken row."""


def read_golds(value: Any) -> list[str]:
    """The gold answers of a field, in order, each once. Raises RowError, UnanswerableError where none was
    published."""
    if isinstance(value, dict):  # SQuAD's {"text": [...]}, Search-R1's {"target": [...]}
        value = next((value[name] for name in ("target", "text", "value") if name in value), value)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(gold, str) for gold in values):
        raise RowError(f"field 'golden_answers' is {value!r}, expected a non-empty list of strings")
    golds = list(dict.fromkeys(part for gold in values for part in listed(gold)))
    if not golds:
        raise RowError(f"field 'golden_answers' is {value!r}, expected a non-empty list of strings")
    known = [gold for gold in golds if gold.strip() != _UNKNOWN]
    if not known:
        raise UnanswerableError(f"no answer is published: the gold answer is {_UNKNOWN!r}")
    return known


def listed(text: str) -> list[str]:
    """The strings of a JSON or Python list that was written as text; any other text alone. Raises
    RowError."""
    inside = text.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return [text]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(inside)
            break
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    else:
        if inside[1:].lstrip()[:1] in ("'", '"'):
            raise RowError(f"gold answers are {text!r}, a list as text that cannot be read; expected JSON")
        return [text]  # "[sic]"
    if not isinstance(found, list) or not all(isinstance(gold, str) for gold in found):
        raise RowError(f"gold answers are {text!r}, expected a list of strings")
    if (
        len(found) == 1
        and _NUMPY.match(inside)
        and read is ast.literal_eval
        and json.dumps(found[0])[1:-1] not in inside
    ):
        raise RowError(f"gold answers are {text!r}: NumPy's text, whose strings run together; expected JSON")
    return found
