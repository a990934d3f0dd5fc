"""The name of a function of the user's own, where the configuration would else name one of ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse.typing import register_type

_FORM = re.compile(r"(?P<place>[^:]+):(?P<function>[A-Za-z_]\w*)")


class OwnFunction(str):
    """`module:function` or `path/to/file.py:function` (own_code/loading.py finds it). Raises ValueError for
    another form."""

    def __new__(cls, text: str) -> OwnFunction:
        """Checked."""
        if not isinstance(text, str) or _FORM.fullmatch(text) is None:
            raise ValueError(f"found {text!r}, expected module:function or file.py:function")
        return super().__new__(cls, text)

    @property
    def place(self) -> str:
        """The module, or the path of the file."""
        return self.rpartition(":")[0]

    @property
    def function(self) -> str:
        """The name within it."""
        return self.rpartition(":")[2]


register_type(OwnFunction, serializer=str, deserializer=OwnFunction)


def own_functions(config: Any, section: str = "") -> Iterator[tuple[str, OwnFunction]]:
    """(dotted key, name) of all that a record of parameters names."""
    if isinstance(config, OwnFunction):
        yield section.removesuffix("."), config
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from own_functions(getattr(config, field.name), f"{section}{field.name}.")
    elif isinstance(config, Mapping):
        for key, value in config.items():
            yield from own_functions(value, f"{section}{key}.")
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from own_functions(value, f"{section}{number}.")
