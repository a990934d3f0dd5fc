"""How a program that may be one of several ranks ends: an error of ours in one line on stderr, and an exit
code (docs/exit-codes.md)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from megatron_sd.errors import ConfigError, MegatronSdError

DONE_EXIT_CODE = 0
FAILED_EXIT_CODE = 1
USAGE_EXIT_CODE = 2  # a command or a configuration that will be no better the next time
STOPPED_EXIT_CODE = 85  # saved as asked: start the same command again and it goes on
STUCK_EXIT_CODE = 86  # of a rank: the watchdog ended it
GIVEN_UP_EXIT_CODE = 86  # of a job script: its attempts make no progress
INTERRUPTED_EXIT_CODE = 130


def exit_code_of(action: Callable[[], int]) -> int:
    """The action's exit code. After an error of ours, or of a disk, one line on stderr, and 2 for a
    configuration error and 1 otherwise."""
    try:
        return action()
    except MegatronSdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return USAGE_EXIT_CODE if isinstance(error, ConfigError) else FAILED_EXIT_CODE
    except OSError as error:  # of a disk: the checkpoints' own writes raise CheckpointError
        print(
            f"{error}: expected to read or write there; make room, or change the path, and resume",
            file=sys.stderr,
            flush=True,
        )
        return FAILED_EXIT_CODE
    except Exception:
        # and leave at once: other ranks notice an ended one, not one that hangs in its teardown
        traceback.print_exc()
        return FAILED_EXIT_CODE
