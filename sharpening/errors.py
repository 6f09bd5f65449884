"""Errors as the person at the keyboard reads them."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, a full quota, a file larger than it may be


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the flag or the file and the remedy. The scripts print it without a stack
    trace and exit with status 2.
    """


class Stop(Exception):
    """Ends a command with an exit status; what there was to say has been said."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; a `Stop` becomes its status, a `UserError` one sentence on stderr and status 2."""
    try:
        return work()
    except Stop as stop:
        return stop.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def first_line(error: BaseException, secret: str | None = None) -> str:
    """An exception on one line: state-dict mismatches, for one, run to hundreds. A `secret` in it becomes ***."""
    text = str(error).replace(secret, "***") if secret else str(error)  # before a cut could leave half of it
    lines = text.strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300].rstrip(':;,. ')}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question in brackets that offers the nearest known word, or nothing."""
    by_lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[nearest[0]]}?)" if nearest else ""


def reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps the telling error in others that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(value: object) -> str:
    """The type of a value that should have been something else, and how it begins."""
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) < 60 else f"{text[:60]}..."
