"""Signals that ask a run to end."""

import signal
from types import FrameType


class StopSignal:
    """Remembers the first SIGTERM or SIGINT so that the step under way can end; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: ending this step, then saving a checkpoint", flush=True)
