"""Work that has begun elsewhere and is waited for later: none of it is left behind when some of it fails."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Begun:
    """Work begun one after the other, in between of which something must go on even if some of it fails.

    As a context it waits for what has begun if that something fails.
    """

    def __init__(self) -> None:
        self._waits: list[Callable[[], Any]] = []
        self._failure: Exception | None = None

    def __enter__(self) -> "Begun":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            _end(self._waits)

    def begin(self, work: Callable[[], Callable[[], Any]]) -> None:
        """Begin work, unless some has failed to begin; what `work()` returns waits for its result."""
        if self._failure is None:
            try:
                self._waits.append(work())
            except Exception as error:
                self._failure = error

    def wait(self) -> list[Any]:
        """All results. The first exception is raised when all work has ended."""
        if self._failure is not None:
            _end(self._waits)
            raise self._failure
        return wait_for_all(self._waits)


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
        _end(waits)
        raise


def _end(waits: Iterable[Callable[[], object]]) -> None:
    """Wait for all of them, whatever becomes of them."""
    for wait in waits:
        with suppress(Exception):
            wait()
