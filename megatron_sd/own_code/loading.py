"""From the name of a function of the user's own to the function, and what tells its file from another."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from megatron_sd.config.own_function import OwnFunction, own_functions
from megatron_sd.errors import ConfigError, OwnCodeError
from megatron_sd.own_code.watching import within_limits

MOST_IMPORT_SECONDS = 600.0  # what a file imports may be large


def load(name: OwnFunction, key: str, form: str, num_arguments: int) -> Callable[..., Any]:
    """The function that a name means. Raises ConfigError when there is none, its file cannot be imported,
    or it does not take so many arguments. form: what it should look like, for messages."""
    module = _module(name, key)
    function = getattr(module, name.function, None)
    if callable(function):
        _check_signature(function, num_arguments, f"{key}: {name}", form)
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


def digests(config: Any) -> dict[str, str]:
    """Of the files of all functions of the user's own that a record of parameters names, by key. What such
    a file imports is not looked at. Raises ConfigError for one that is not there."""
    return {f"{key} ({name})": digest_of(name, key) for key, name in own_functions(config)}


def digest_of(name: OwnFunction, key: str) -> str:
    """Of the file that the function stands in. Raises ConfigError."""
    is_file = name.place.endswith(".py")
    path = Path(name.place if is_file else _module(name, key).__file__ or "")
    try:
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: {name}: {error}, expected a Python file there") from error


def _check_signature(function: Callable[..., Any], num_arguments: int, who: str, form: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*range(num_arguments))
    except TypeError as error:
        raise ConfigError(f"{who}{signature} cannot be called so ({error}), expected {form}") from error
