"""How a program that may be one of several ranks ends: an error of ours in one line on stderr, and an exit
code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from megatron_sd.errors import ConfigError, MegatronSdError


def exit_code_of(action: Callable[[], int]) -> int:
    """The action's exit code. After an error of ours, or of a disk, one line on stderr, and 2 for a
    configuration error and 1 otherwise."""
    try:
        return action()
    except MegatronSdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:  # of a disk: the checkpoints' own writes raise CheckpointError
        print(
            f"{error}: expected to read or write there; make room, or change the path, and resume",
            file=sys.stderr,
            flush=True,
        )
        return 1
    except Exception:
        # and leave at once: other ranks notice an ended one, not one that hangs in its teardown
        traceback.print_exc()
        return 1
