"""Work that has begun elsewhere and is waited for later: none of it is left behind when some of it fails."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


def wait_for_all(waits: Sequence[Callable[[], T]]) -> list[T]:
    """What each of them returns. The first exception is raised when the others have ended, too."""
    results: list[T] = []
    failure: Exception | None = None
    for wait in waits:
        try:
            results.append(wait())
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return results


@contextmanager
def beginning(waits: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Within, work begins and is added to `waits`. If that fails, what has begun is waited for."""
    try:
        yield
    except Exception:
        for wait in waits:
            with suppress(Exception):
                wait()
        raise
