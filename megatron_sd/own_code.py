"""Functions of the user's own in the place of ours: found, tried before the run, and watched while it lasts.

A room that offers such a place has a Seam beside its table. `seam.choose(name)` gives the table's function, or
the user's: imported, called on an example, and from then on called within limits of time and of what it prints.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

import xxhash

from megatron_sd.config.own_function import OwnFunction, own_functions
from megatron_sd.errors import ConfigError, OwnCodeError
from megatron_sd.records import (
    SEARCH,
    Action,
    Hit,
    Passage,
    Question,
    Rollout,
    RolloutGroup,
    Scores,
    StopReason,
    Turn,
)

MOST_SECONDS = 60.0  # of one call
MOST_IMPORT_SECONDS = 600.0  # what a file imports may be large
MOST_PRINTED = 1 << 16  # characters of one call

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Seam(Generic[Function]):
    """Where a function of the user's own may stand in for one of ours.

    key: of the configuration, for messages. form: what it looks like, as in `gate(context) -> bool`. table: ours,
    by name. example: arguments that a new one is tried with. fault: of what it returned for some arguments, in
    words; None: nothing is wrong.
    """

    key: str
    form: str
    table: Mapping[str, Function]
    example: Callable[[], tuple[Any, ...]]
    fault: Callable[..., str | None]

    def choose(self, name: str) -> Function:
        """Ours of this name, or the user's own. Raises ConfigError for one that cannot be had, or whose answer
        to the example is not what is expected, or another one at the second call."""
        if not isinstance(name, OwnFunction):
            return self.table[name]
        own = Watched(name, load(name, self.key), self)
        arguments = self.example()
        _check_signature(own, len(arguments))
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
    """A function of the user's own, each call of which is looked at. Raises OwnCodeError for a call that fails,
    does not end, prints without end or returns what the seam does not take."""

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


def example_groups() -> list[RolloutGroup]:
    """Two questions with a right and a wrong rollout each, scored: what new functions are tried with."""
    return [_example_group(number) for number in range(2)]


def _example_group(number: int) -> RolloutGroup:
    question = Question(
        id=f"q{number}",
        text="Who guides the mentor of Kalo Miren?",
        golden_answers=("Dava Sul",),
        supporting=(("p1",), ("p2",)),
    )
    answers = ("Dava Sul", "Nira Vo")
    return RolloutGroup(
        question=question,
        rollouts=tuple(_example_rollout(question, index, answer) for index, answer in enumerate(answers)),
    )


def _example_rollout(question: Question, index: int, answer: str) -> Rollout:
    passage = Passage(id="p1", title="Kalo Miren", text="Kalo Miren's mentor is Teno Ruf.")
    searched = Turn(
        completion_ids=(5, 6, 7, 8),
        completion_logprobs=(-0.1, -0.2, -0.3, -0.1),
        observation_ids=(9, 10),
        action=Action(tool=SEARCH, text="mentor of Kalo Miren", span=(1, 3)),
        hits=(Hit(passage=passage, score=1.0),),
    )
    answered = Turn(completion_ids=(11, 12), completion_logprobs=(-0.1, -0.1), answer=answer)
    is_right = float(answer in question.golden_answers)
    return Rollout(
        question_id=question.id,
        index=index,
        prompt_ids=(1, 2, 3, 4),
        turns=(searched, answered),
        stop_reason=StopReason.ANSWERED,
        answer=answer,
        scores=Scores(reward=is_right, em=is_right, f1=is_right, format_valid=1.0, hop_hit_rate=0.5),
    )


def load(name: OwnFunction, key: str) -> Callable[..., Any]:
    """The function that a name means. Raises ConfigError when there is none, or its file cannot be imported."""
    module = _module(name, key)
    function = getattr(module, name.function, None)
    if callable(function):
        return function
    known = [
        own for own, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    near = difflib.get_close_matches(name.function, known, n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(known)) or 'none there'}"
    )
    raise ConfigError(f"{key}: {name.place} has no function {name.function}; {hint}")


def _module(name: OwnFunction, key: str) -> ModuleType:
    """Two functions of one file share it."""
    if name.place.endswith(".py"):
        path = Path(name.place).resolve()
        if not path.is_file():
            raise ConfigError(f"{key}: found no file at {path}, expected the one of {name}")
        known = f"own_code_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        if known in sys.modules:
            return sys.modules[known]
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None and spec.loader is not None, path  # of a .py file there always is one
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module  # dataclasses of it look there
        try:
            _importing(lambda: spec.loader.exec_module(module), name, key)
        except ConfigError:
            del sys.modules[known]
            raise
        return module
    with _working_directory_first():
        return _importing(lambda: importlib.import_module(name.place), name, key)


def _importing(action: Callable[[], Any], name: OwnFunction, key: str) -> Any:
    try:
        return within_limits(action, f"{key}: {name.place}", MOST_IMPORT_SECONDS)
    except OwnCodeError as error:
        raise ConfigError(f"{error}; expected a module that can be imported here") from error


@contextlib.contextmanager
def _working_directory_first() -> Any:
    """Where a module of the user's is looked for, as `python -m` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def within_limits(call: Callable[[], Any], who: str, most_seconds: float) -> Any:
    """What the call returns, by a thread of its own. Raises OwnCodeError, which begins with `who`."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:  # SystemExit is no way out of a run, either
            outcome["error"] = error

    thread = threading.Thread(target=work, name=who, daemon=True)
    printed = _Meter(sys.stdout)
    with contextlib.redirect_stdout(cast(Any, printed)):
        thread.start()
        thread.join(most_seconds)
    if thread.is_alive():
        frame = sys._current_frames().get(thread.ident or 0)
        at = f" (at {_place(traceback.extract_stack(frame))})" if frame else ""
        raise OwnCodeError(f"{who} has not returned after {most_seconds:g} s{at}, expected an answer sooner")
    if printed.is_full:
        raise OwnCodeError(
            f"{who} printed more than {MOST_PRINTED} characters in one call, expected a few lines"
        )
    error = outcome.get("error")
    if error is not None:
        at = _place(traceback.extract_tb(error.__traceback__))
        raise OwnCodeError(f"{who} raised {type(error).__name__}: {error} ({at})") from error
    return outcome["result"]


class _Meter(io.TextIOBase):
    """Hands on what is printed, up to a limit."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._left = MOST_PRINTED
        self.is_full = False

    def write(self, text: str) -> int:
        """Raise ValueError beyond the limit."""
        self._left -= len(text)
        if self._left < 0:
            self.is_full = True
            raise ValueError("printed too much")
        return self._stream.write(text)

    def flush(self) -> None:
        """Of the stream behind it."""
        self._stream.flush()


def digests(config: Any) -> dict[str, str]:
    """Of the files of all functions of the user's own that a record of parameters names, by key. What such a file
    imports is not looked at. Raises ConfigError for one that is not there."""
    return {f"{key} ({name})": digest_of(name, key) for key, name in own_functions(config)}


def digest_of(name: OwnFunction, key: str) -> str:
    """Of the file that the function stands in. Raises ConfigError."""
    is_file = name.place.endswith(".py")
    path = Path(name.place if is_file else _module(name, key).__file__ or "")
    try:
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: {name}: {error}, expected a Python file there") from error


def _check_signature(own: Watched, num_arguments: int) -> None:
    try:
        inspect.signature(own.function).bind(*range(num_arguments))
    except TypeError as error:
        raise ConfigError(
            f"{own.seam.key}: {own.name}{inspect.signature(own.function)} cannot be called so ({error}),"
            f" expected {own.seam.form}"
        ) from error
    except ValueError:  # some builtins have no signature
        return


def _alike(first: Any, second: Any) -> bool:
    """They look the same, or are equal; arrays that look otherwise can only be compared by their looks."""
    try:
        return repr(first) == repr(second) or bool(first == second)
    except ValueError:
        return False


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost place that is not within an installed package or the interpreter."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platlib", "purelib"))
    own = [frame for frame in stack if not frame.filename.startswith((*installed, "<"))]
    frame = [*stack, *own][-1]
    return f"{frame.filename}:{frame.lineno}"


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
