"""Files that a run cannot write: noticed by whoever writes, known to every rank, said in one sentence."""

import os
import re
from collections.abc import Callable

from safetensors import SafetensorError
from torch.distributed import ProcessGroup

from sharpening.errors import NO_ROOM, reason
from sharpening.running.launching import any_rank

TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|iostream error|cannot be opened")


class WriteError(Exception):
    """Files of a run could not be written, on this rank or on another; the message says which, why and what to do."""


def attempt(what: str, work: Callable[[], object]) -> str:
    """Do work that writes files into `--output_dir`; returns why `what` could not be written, or nothing.

    Python, PIL and the trackers raise an OSError; safetensors and torch.save raise errors of their own, which are
    known by their type and by their words.
    """
    try:
        work()
    except (OSError, SafetensorError) as error:
        number = _number(error)
        why = os.strerror(number) if number else reason(error)
        full = number in NO_ROOM
    except RuntimeError as error:
        if not TORCH_WRITER.search(str(error)):
            raise
        why, full = "torch.save could not write to the end of a file", True  # it does not know the system's reason
    else:
        return ""
    remedy = "free space on the disk of --output_dir" if full else "see that --output_dir can be written"
    return f"{what} cannot be written ({why}); {remedy}, then continue with --resume_from_checkpoint latest"


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error, which safetensors has in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def all_wrote(failure: str, hosts: ProcessGroup | None) -> None:
    """Wait for all ranks, each of which must call this with what `attempt` returned to it; hosts as of
    `launching.any_rank`.

    Raises:
        WriteError: on every rank, if one of them has failed.
    """
    if any_rank(bool(failure), hosts):
        raise WriteError(failure or "another process cannot write; its message says why")
