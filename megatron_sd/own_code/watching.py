"""A call of the user's own code, within limits of time and of what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, cast

from megatron_sd.errors import OwnCodeError

MOST_SECONDS = 60.0  # of one call
MOST_PRINTED = 1 << 16  # characters of one call


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
        raise OwnCodeError(_raised(who, error)) from error
    return outcome["result"]


async def answer(
    function: Callable[..., Any], arguments: tuple[Any, ...], who: str, most_seconds: float
) -> Any:
    """What a coroutine function returns, which may wait, or a plain one, inline. Raises OwnCodeError, which
    begins with `who`, for one that raises or takes too long."""
    if not inspect.iscoroutinefunction(function):
        return within_limits(lambda: function(*arguments), who, most_seconds)
    try:
        return await asyncio.wait_for(function(*arguments), most_seconds)
    except TimeoutError as error:
        raise OwnCodeError(
            f"{who} has not returned after {most_seconds:g} s, expected an answer sooner"
        ) from error
    except Exception as error:
        raise OwnCodeError(_raised(who, error)) from error


def _raised(who: str, error: BaseException) -> str:
    place = _place(traceback.extract_tb(error.__traceback__))
    return f"{who} raised {type(error).__name__}: {error} ({place})"


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


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost place that is not within an installed package or the interpreter."""
    installed = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platlib", "purelib"))
    own = [frame for frame in stack if not frame.filename.startswith((*installed, "<"))]
    frame = [*stack, *own][-1]
    return f"{frame.filename}:{frame.lineno}"
