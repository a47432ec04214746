"""The exit codes, the same for every command."""

from typing import Final

from krea_dagster.errors import (
    InputError,
    JournalUnavailable,
    KreaError,
    StorageRefused,
    StorageUnavailable,
)

DONE: Final = 0
NOT_DELIVERED: Final = 1
WRONG_USE: Final = 2
STOPPED: Final = 3
#: EX_TEMPFAIL of sysexits.h: the same command may succeed later.
TRY_LATER: Final = 75


def code_of(error: KreaError) -> int:
    """Return the exit code of an error that ended a command."""
    if isinstance(error, JournalUnavailable | StorageUnavailable):
        return TRY_LATER
    return WRONG_USE if isinstance(error, InputError | StorageRefused) else NOT_DELIVERED
