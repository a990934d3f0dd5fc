"""Where a function of the user's own may stand in for one of ours.

A room that offers such a place has a Seam beside its table. `seam.choose(name)` gives the table's function,
or the user's: imported, called on an example, and from then on called within limits of time and of what it
prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError, OwnCodeError
from megatron_sd.own_code.loading import load
from megatron_sd.own_code.watching import MOST_SECONDS, within_limits

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Seam(Generic[Function]):
    """Where a function of the user's own may stand in for one of ours.

    key: of the configuration, for messages. form: what it looks like, as in `gate(context) -> bool`. table:
    ours, by name. example: arguments that a new one is tried with. fault: of what it returned for some
    arguments, in words; None: nothing is wrong.
    """

    key: str
    form: str
    table: Mapping[str, Function]
    example: Callable[[], tuple[Any, ...]]
    fault: Callable[..., str | None]

    def choose(self, name: str) -> Function:
        """Ours of this name, or the user's own. Raises ConfigError for one that cannot be had, or whose
        answer to the example is not what is expected, or another one at the second call."""
        if not isinstance(name, OwnFunction):
            return self.table[name]
        arguments = self.example()
        own = Watched(name, load(name, self.key, self.form, len(arguments)), self)
        try:
            first, second = own(*arguments), own(*arguments)
        except OwnCodeError as error:
            raise ConfigError(f"{error}; it was tried on an example before the run") from error
        if not _alike(first, second):
            raise ConfigError(
                f"{self.key}: {name} returned {_shortened(first)} and then {_shortened(second)} for the same"
                " arguments, expected a pure function, else no run could be repeated or resumed"
            )
        return cast(Function, own)


@dataclass(frozen=True)
class Watched:
    """A function of the user's own, each call of which is looked at. Raises OwnCodeError for a call that
    fails, does not end, prints without end or returns what the seam does not take."""

    name: OwnFunction
    function: Callable[..., Any]
    seam: Seam[Any]

    def __call__(self, *arguments: Any) -> Any:
        """The function's own answer."""
        key, form = self.seam.key, self.seam.form
        result = within_limits(lambda: self.function(*arguments), f"{key}: {self.name}", MOST_SECONDS)
        fault = self.seam.fault(result, *arguments)
        if fault is not None:
            raise OwnCodeError(f"{key}: {self.name} returned {fault}, expected {form}")
        return result


def _alike(first: Any, second: Any) -> bool:
    """They look the same, or are equal; arrays that look otherwise can only be compared by their looks."""
    try:
        return repr(first) == repr(second) or bool(first == second)
    except ValueError:
        return False


def _shortened(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def fault_of_number(value: Any) -> str | None:
    """For a seam that takes a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{_shortened(value)} ({type(value).__name__})"
    return None if abs(value) < float("inf") else f"{value}"


def fault_of_type(value: Any, wanted: type) -> str | None:
    """For a seam that takes values of one type."""
    return None if isinstance(value, wanted) else f"{_shortened(value)} ({type(value).__name__})"
